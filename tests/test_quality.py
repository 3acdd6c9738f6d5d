"""PSNR and SSIM against values known without the library that computes them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxfire import ArgumentError
from fluxfire.bench.quality import psnr, ssim


def noise(seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_equal_pictures_are_infinitely_close():
    assert psnr(noise(), noise()) == math.inf
    assert ssim(noise(), noise()) == 1.0


def test_psnr_of_a_known_difference():
    grey = np.full((16, 16, 3), 100, dtype=np.uint8)
    # Every value is off by 10: 20 log10(255 / 10).
    assert psnr(grey, grey + 10) == pytest.approx(28.1308, abs=1e-4)
    # White against black is as far as it gets.
    assert psnr(np.zeros_like(grey), np.full_like(grey, 255)) == 0.0


def test_ssim_of_flat_pictures_is_the_formula_of_their_means():
    a, b = np.full((16, 16, 3), 0.4), np.full((16, 16, 3), 0.5)
    luminance = (2 * 0.4 * 0.5 + 0.01**2) / (0.4**2 + 0.5**2 + 0.01**2)  # no contrast: the other factor is 1
    assert ssim(a, b) == pytest.approx(luminance, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), amplitude=st.integers(1, 60))
def test_bytes_and_floats_of_the_same_picture_agree(seed: int, amplitude: int):
    a = noise(seed)
    rng = np.random.default_rng(seed + 1)
    b = np.clip(a.astype(int) + rng.integers(-amplitude, amplitude + 1, a.shape), 0, 255).astype(np.uint8)
    assert psnr(a / 255, b / 255) == pytest.approx(psnr(a, b), rel=1e-6)
    assert ssim(a / 255, b / 255) == pytest.approx(ssim(a, b), abs=1e-6)
    assert psnr(a, b) == psnr(b, a)


def test_more_noise_is_further_away():
    a = np.full((32, 32, 3), 0.5)
    step = np.random.default_rng(0).uniform(-1, 1, a.shape)
    distances = [(psnr(a, a + s * step), ssim(a, a + s * step)) for s in (0.01, 0.05, 0.2)]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((16, 16)), np.zeros((16, 16)), r"needed a picture \(H, W, 3\)"),
        (np.zeros((16, 16, 3)), np.zeros((16, 17, 3)), "one shape and type"),
        (np.zeros((16, 16, 3)), np.zeros((16, 16, 3), np.float32), "one shape and type"),
        (np.zeros((16, 16, 3), np.int64), np.zeros((16, 16, 3), np.int64), "found pictures of int64"),
        (np.zeros((16, 16, 3)), np.full((16, 16, 3), 1.5), "found values from 1.5 to 1.5"),
        (np.zeros((16, 16, 3)), np.full((16, 16, 3), math.nan), "to nan"),
    ],
    ids=["grey", "shapes", "dtypes", "integers", "range", "nan"],
)
def test_what_is_not_two_pictures_is_refused(a: np.ndarray, b: np.ndarray, message: str):
    for distance in (psnr, ssim):
        with pytest.raises(ArgumentError, match=message):
            distance(a, b)


def test_ssim_says_which_size_it_needs():
    with pytest.raises(ArgumentError, match="11 pixels"):
        ssim(noise(size=10), noise(size=10))


def test_without_scikit_image_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage.metrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fluxfire\[demo\]'"):
        psnr(noise(), noise())
