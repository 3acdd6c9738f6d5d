"""How far a picture is from the one it should equal: PSNR and SSIM.

Both compare pixel by pixel, so they answer "is this the same picture from the same seed?", which is what an approximate
step is asked, and not "is this a good picture?".

- PSNR, in dB: 10 log10(range^2 / mean squared difference). Infinite for equal pictures.
- SSIM, -1 to 1: local means, contrasts and structure under a Gaussian window (sigma 1.5), averaged over pixels and
  channels (Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861). 1 for equal pictures.

Both are scikit-image's (`pip install 'fluxfire[demo]'`). Pictures are (H, W, 3) arrays: uint8, or floating values
between 0 and 1.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fluxfire.errors import ArgumentError

Picture: TypeAlias = npt.NDArray[Any]  # (H, W, 3)

_WINDOW_PX = 11  # of SSIM's Gaussian: sigma 1.5, cut off at 3.5 sigma


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB; `math.inf` for equal pictures.

    Raises:
        ArgumentError: the two are not pictures of one shape and type.
    """
    metrics, value_range = _metrics(), _value_range(a, b)
    if np.array_equal(a, b):
        return float("inf")  # scikit-image gives the same, with a warning of the division by zero
    return float(metrics.peak_signal_noise_ratio(a, b, data_range=value_range))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity with the settings of Wang et al., -1 to 1.

    Raises:
        ArgumentError: the two are not pictures of one shape and type, or are smaller than the window of 11 pixels.
    """
    metrics, value_range = _metrics(), _value_range(a, b)
    if min(a.shape[:2]) < _WINDOW_PX:
        raise ArgumentError(
            f"found pictures of shape {a.shape}, needed {_WINDOW_PX} pixels or more on each side for SSIM"
        )
    return float(
        metrics.structural_similarity(
            a, b, data_range=value_range, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def _value_range(a: Picture, b: Picture) -> float:
    """The distance from black to white, of two arrays that can be compared."""
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


def _metrics() -> ModuleType:
    try:
        import skimage.metrics
    except ModuleNotFoundError as error:
        message = f"PSNR and SSIM need {error.name}: pip install 'fluxfire[demo]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    return skimage.metrics
