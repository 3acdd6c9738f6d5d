"""How far a picture is from the one it should equal: PSNR, SSIM, MS-SSIM, FLIP, SSIMULACRA2.

All compare a picture with the one that it should be, so they answer "is this the same picture from the same seed?",
which is what an approximate step is asked, and not "is this a good picture?" (`learned.py` has two that do).

- PSNR, in dB: 10 log10(range^2 / mean squared difference). Infinite for equal pictures. Pixel by pixel.
- SSIM, -1 to 1: local means, contrasts and structure under a Gaussian window (sigma 1.5), averaged over pixels and
  channels (Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861). 1 for equal pictures.
- MS-SSIM, 0 to 1: the same at five scales (Wang et al., 2003, https://doi.org/10.1109/ACSSC.2003.1292216). Its
  window of 11 pixels needs sides of 176; smaller pictures get one of 7, from 112 pixels on.
- FLIP, 0 to 1, **lower is nearer**: what an eye sees that flips between the two, at 67 pixels a degree (Andersson et
  al., 2020, https://doi.org/10.1145/3406183).
- SSIMULACRA2, up to 100: 90 and more is hard to tell apart, 70 high, 50 medium, 30 low quality; can be negative
  (https://github.com/cloudinary/ssimulacra2). Below 256 pixels it has fewer than its six scales: compare one size only.

PSNR and SSIM are scikit-image's (`pip install 'fluxfire[demo]'`), the others torchmetrics', NVIDIA's and the package
ssimulacra2's (`pip install 'fluxfire[quality]'`). Nothing is downloaded. Pictures are (H, W, 3) arrays: uint8, or
floating values between 0 and 1.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fluxfire.errors import ArgumentError

Picture: TypeAlias = npt.NDArray[Any]  # (H, W, 3)

_WINDOW_PX: Final = 11  # of SSIM's Gaussian: sigma 1.5, cut off at 3.5 sigma
_MS_SSIM_SIDES_PX: Final = (112, 176)  # a window of 7 or of 11 pixels after four halvings


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB; `math.inf` for equal pictures.

    Raises:
        ArgumentError: the two are not pictures of one shape and type.
    """
    metrics, value_range = _package("skimage.metrics", "demo"), check_pair(a, b)
    if np.array_equal(a, b):
        return float("inf")  # scikit-image gives the same, with a warning of the division by zero
    return float(metrics.peak_signal_noise_ratio(a, b, data_range=value_range))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity with the settings of Wang et al., -1 to 1.

    Raises:
        ArgumentError: the two are not pictures of one shape and type, or are smaller than the window of 11 pixels.
    """
    metrics, value_range = _package("skimage.metrics", "demo"), check_pair(a, b)
    if min(a.shape[:2]) < _WINDOW_PX:
        raise ArgumentError(
            f"found pictures of shape {a.shape}, needed {_WINDOW_PX} pixels or more on each side for SSIM"
        )
    return float(
        metrics.structural_similarity(
            a, b, data_range=value_range, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def ms_ssim(a: Picture, b: Picture) -> float:
    """SSIM at five scales, 0 to 1.

    Raises:
        ArgumentError: the two are not pictures of one shape and type, or have a side of fewer than 112 pixels.
    """
    image, value_range = _package("torchmetrics.functional.image", "quality"), check_pair(a, b)
    side = min(a.shape[:2])
    least, for_11 = _MS_SSIM_SIDES_PX
    if side < least:
        raise ArgumentError(
            f"found pictures of shape {a.shape}, needed {least} pixels or more on each side for MS-SSIM"
        )
    x, y = (torch.from_numpy(p / value_range).double().permute(2, 0, 1)[None] for p in (a, b))
    kernel_size, sigma = (11, 1.5) if side >= for_11 else (7, 0.9)  # sigma is what sets the window, of 3.5 sigma
    like = image.multiscale_structural_similarity_index_measure(
        y, x, sigma=sigma, kernel_size=kernel_size, data_range=1.0, normalize="relu"
    )
    return float(like)


def flip(a: Picture, b: Picture) -> float:
    """Mean FLIP error of `b` against the reference `a`, 0 (equal) to 1, seen at 67 pixels a degree.

    Raises:
        ArgumentError: the two are not pictures of one shape and type.
    """
    evaluator, value_range = _package("flip_evaluator", "quality"), check_pair(a, b)
    reference, test = (np.ascontiguousarray(p / value_range, dtype=np.float32) for p in (a, b))
    return float(evaluator.evaluate(reference, test, "LDR", applyMagma=False)[1])


def ssimulacra2(a: Picture, b: Picture) -> float:
    """SSIMULACRA2 of `b` against the original `a`, up to 100 (equal). Floating values are rounded to bytes.

    Raises:
        ArgumentError: the two are not pictures of one shape and type, or are smaller than its window of 8 pixels.
    """
    from PIL import Image

    package = _package("ssimulacra2", "quality")
    check_pair(a, b)
    if min(a.shape[:2]) < 8:
        raise ArgumentError(f"found pictures of shape {a.shape}, needed 8 pixels or more on each side for SSIMULACRA2")
    files = []
    for picture in (a, b):
        files.append(io.BytesIO())
        Image.fromarray(as_bytes(picture)).save(files[-1], "PNG", compress_level=0)
    return float(package.compute_ssimulacra2(*files))


@dataclass(frozen=True, slots=True)
class Metric:
    """A distance or likeness of two pictures: how to compute it, and how to read it."""

    measure: Callable[[Picture, Picture], float]  # (reference, picture)
    title: str
    higher_is_nearer: bool = True


METRICS: Final = {
    "psnr": Metric(psnr, "PSNR, dB"),
    "ssim": Metric(ssim, "SSIM"),
    "ms_ssim": Metric(ms_ssim, "MS-SSIM"),
    "flip": Metric(flip, "FLIP", higher_is_nearer=False),
    "ssimulacra2": Metric(ssimulacra2, "SSIMULACRA2"),
}


def scores(reference: Picture, picture: Picture) -> dict[str, float]:
    """Every metric of `METRICS`, by name."""
    return {name: metric.measure(reference, picture) for name, metric in METRICS.items()}


def as_bytes(picture: Picture) -> Picture:
    """uint8, rounded from values between 0 and 1."""
    return picture if picture.dtype == np.uint8 else (picture * 255).round().astype(np.uint8)


def jpeg(picture: Picture, quality: int) -> Picture:
    """The picture after JPEG at this quality, 1 to 95, by Pillow: a yardstick that everybody has seen."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(as_bytes(picture)).save(file, "JPEG", quality=quality)
    decoded: Picture = np.asarray(Image.open(file))
    return decoded


def check_pair(a: Picture, b: Picture) -> float:
    """The distance from black to white.

    Raises:
        ArgumentError: the two are not pictures of one shape and type.
    """
    for picture in (a, b):
        if picture.ndim != 3 or picture.shape[2] != 3:
            raise ArgumentError(f"found an array of shape {picture.shape}, needed a picture (H, W, 3)")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ArgumentError(
            f"found {a.dtype} {a.shape} and {b.dtype} {b.shape}, needed two pictures of one shape and type"
        )
    if a.dtype == np.uint8:
        return 255.0
    if not np.issubdtype(a.dtype, np.floating):
        raise ArgumentError(f"found pictures of {a.dtype}, needed uint8, or floating values between 0 and 1")
    for picture in (a, b):
        if not (picture.min() >= 0 and picture.max() <= 1):  # so written, nan does not pass
            raise ArgumentError(f"found values from {picture.min()} to {picture.max()}, needed 0 to 1")
    return 1.0


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed, which this metric needs: pip install 'fluxfire[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
