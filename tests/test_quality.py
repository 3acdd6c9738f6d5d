"""Metrics against values known without the library that computes them."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxfire import ArgumentError, FluxfireError, demo
from fluxfire.bench.learned import lpips, text_score
from fluxfire.bench.quality import METRICS, flip, jpeg, ms_ssim, psnr, scores, ssim, ssimulacra2


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


FLAT = [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.2, 0.5, 0.4), (0.25, 0.45, 0.4)), ((0.9, 0.1, 0.1), (0.1, 0.1, 0.9))]


def flat(colour: tuple[float, float, float], size: int = 128) -> np.ndarray:
    return np.broadcast_to(np.array(colour), (size, size, 3)).copy()


def hunt_lab(colour: tuple[float, float, float]) -> np.ndarray:
    """CIELAB with a* and b* scaled by lightness, as FLIP's paper has it."""
    from skimage.color import rgb2lab

    lightness, a, b = rgb2lab(np.array(colour)[None, None])[0, 0]
    return np.array([lightness, 0.01 * lightness * a, 0.01 * lightness * b])


def hyab(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a[0] - b[0]) + np.hypot(*(a - b)[1:]))


@pytest.mark.parametrize(("a", "b"), FLAT)
def test_flip_of_flat_pictures_is_the_paper_s_formula(a: Any, b: Any):
    """Without edges and points FLIP is the colour difference, mapped to 0..1 in two straight pieces."""
    largest = hyab(hunt_lab((0.0, 1.0, 0.0)), hunt_lab((0.0, 0.0, 1.0))) ** 0.7
    error, knee = hyab(hunt_lab(a), hunt_lab(b)) ** 0.7, 0.4 * largest
    expected = 0.95 * error / knee if error < knee else 0.95 + 0.05 * (error - knee) / (largest - knee)
    assert flip(flat(a), flat(b)) == pytest.approx(expected, abs=2e-3)


def test_ms_ssim_of_flat_pictures_is_the_last_scale_s_luminance():
    a, b = 0.4, 0.5
    luminance = (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
    for size in (112, 176):  # a window of 7 pixels, and of 11
        assert ms_ssim(flat((a,) * 3, size), flat((b,) * 3, size)) == pytest.approx(luminance**0.1333, abs=1e-6)


def test_every_metric_orders_the_damage_and_knows_equal_pictures():
    picture = np.asarray(demo.reference("red-apple-noto"))
    equal = scores(picture, picture)
    assert equal == pytest.approx({"psnr": math.inf, "ssim": 1, "ms_ssim": 1, "flip": 0, "ssimulacra2": 100}, abs=1e-9)
    ladder = [scores(picture, other) for other in (jpeg(picture, 95), jpeg(picture, 50), jpeg(picture, 5))]
    ladder = [equal, *ladder, scores(picture, np.asarray(demo.reference("boar-noto")))]
    for name, metric in METRICS.items():
        values = [row[name] for row in ladder]
        assert values == sorted(values, reverse=metric.higher_is_nearer), name
        assert len(set(values)) == len(values), name


def test_ssimulacra2_knows_which_picture_is_the_original():
    """It tells lost detail from added artefacts; the others here but FLIP's tails are symmetric."""
    picture = np.asarray(demo.reference("red-apple-noto"))
    worse = jpeg(picture, 20)
    assert ssimulacra2(picture, worse) != ssimulacra2(worse, picture)
    assert ssimulacra2(picture / 255, worse / 255) == ssimulacra2(picture, worse)


@pytest.mark.parametrize(("metric", "size", "needed"), [(ms_ssim, 111, "112 pixels"), (ssimulacra2, 7, "8 pixels")])
def test_too_small_pictures_are_refused(metric: Any, size: int, needed: str):
    with pytest.raises(ArgumentError, match=needed):
        metric(noise(size=size), noise(size=size))


@pytest.mark.parametrize(
    ("metric", "module"),
    [(ms_ssim, "torchmetrics.functional.image"), (flip, "flip_evaluator"), (ssimulacra2, "ssimulacra2")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, metric: Any, module: str):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fluxfire\[quality\]'"):
        metric(noise(size=128), noise(size=128))


def test_text_scores_are_the_cosine_of_picture_and_prompt(tmp_path: Path):
    """With a tiny CLIP of random weights in a folder: loaded, asked, and compared with the embeddings themselves."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    tokenizer = CLIPTokenizerFast.from_pretrained(demo.model_path() / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    ).eval()
    model.save_pretrained(tmp_path)
    CLIPProcessor(CLIPImageProcessor(size=32, crop_size=32), tokenizer).save_pretrained(tmp_path)
    picture, prompt = np.asarray(demo.reference("red-apple-noto")), "red apple"
    given = CLIPProcessor.from_pretrained(tmp_path)(text=[prompt], images=[picture], return_tensors="pt")
    with torch.no_grad():
        out = model(**given)
    cosine = float((out.image_embeds @ out.text_embeds.T).item())
    assert text_score("clip_score", weights=str(tmp_path))(picture, prompt) == pytest.approx(100 * cosine, rel=1e-4)
    scale = model.logit_scale.exp().item()
    assert text_score("pick_score", weights=str(tmp_path))(picture, prompt) == pytest.approx(scale * cosine, rel=1e-4)


def test_without_the_hub_the_error_says_what_to_type(tmp_path: Path):
    with pytest.raises(FluxfireError, match="hf download openai/clip-vit-large-patch14"):
        text_score("clip_score", weights=str(tmp_path / "nothing"))


def test_lpips_without_torchvision_says_what_to_type(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchvision"):
        lpips()
