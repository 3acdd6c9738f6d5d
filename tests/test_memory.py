"""channels_last, tiles, offload: exact where they say so, and nothing left behind.

To offload, "cpu" and "cpu:0" are two devices: hooks do copy weights from one to the other, without an accelerator.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import attributes, embeds, make_pipe, picture, run
from diffusers import FluxKontextPipeline, FluxPipeline

import fluxfire
from fluxfire import (
    apply_memory_format,
    apply_offload,
    apply_vae_tiling,
    check_memory_format,
    check_offload,
    check_vae_tiling,
)

pictures = functools.partial(run, output_type="pt", steps=3)

OFFLOADS: dict[str, dict[str, Any]] = {
    "model": {"kind": "model"},
    "blocks": {"kind": "group"},
    "leaves": {"kind": "group", "offload_type": "leaf_level"},
}
offloads = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


def tensors(pipe: Any) -> dict[str, tuple[int, tuple[int, ...], torch.device, torch.Tensor]]:
    """Every parameter and buffer: which object, its strides, where, and its values."""
    return {
        f"{part}.{name}": (id(tensor), tensor.stride(), tensor.device, tensor.detach().clone())
        for part in ("transformer", "vae")
        for members in (getattr(pipe, part).named_parameters(), getattr(pipe, part).named_buffers())
        for name, tensor in members
    }


@pytest.fixture
def untouched(pipe: Any) -> Callable[[], None]:
    """`untouched()` claims that the pipe is as it was when the test began, to the last attribute and bit."""
    baseline = pictures(pipe)
    own, weights = attributes(pipe), tensors(pipe)

    def check() -> None:
        now = attributes(pipe)
        assert now.keys() == own.keys()
        # A run sets attributes of the pipe and the scheduler itself.
        assert [key for key in own if own[key] != now[key] and key[0] not in ("pipe", "scheduler")] == []
        for name, (*what, values) in tensors(pipe).items():
            assert what == list(weights[name][:3]), name
            assert torch.equal(values, weights[name][3]), name
        assert torch.equal(pictures(pipe), baseline)

    return check


def test_memory_format_is_exact_within_rounding(pipe: Any) -> None:
    baseline = pictures(pipe)
    assert apply_memory_format(pipe) is pipe
    weights = [weight for weight in pipe.vae.parameters() if weight.dim() == 4]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    out = pictures(pipe)
    assert ((out - baseline).norm() / baseline.norm()).item() <= 1e-5


def test_undo_gives_parameters_their_strides_back(pipe: Any) -> None:
    first = pipe.vae.decoder.conv_in.weight
    first.data = first.data.contiguous(memory_format=torch.channels_last)  # by the user: it stays so
    last = pipe.vae.decoder.conv_out.weight
    last.data = torch.cat([last.data, last.data], dim=1)[:, : last.shape[1]]  # strides of no memory format
    before, baseline = tensors(pipe), pictures(pipe)
    apply_memory_format(pipe)
    assert last.is_contiguous(memory_format=torch.channels_last)
    fluxfire.restore_pipeline(pipe)
    for name, (*what, values) in tensors(pipe).items():
        assert what == list(before[name][:3]) and torch.equal(values, before[name][3]), name
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pictures(pipe), baseline)


def test_memory_format_says_why_not(pipe: Any) -> None:
    pipe.vae.to(memory_format=torch.channels_last)
    assert "channels_last already" in str(check_memory_format(pipe))
    pipe.vae.to(memory_format=torch.contiguous_format)
    assert check_memory_format(pipe) is None
    pipe.enable_model_cpu_offload(device="cpu")
    assert check_memory_format(pipe) is None
    pipe.remove_all_hooks()
    pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(fluxfire.StepError, match="AutoencoderKL offloaded"):
        apply_memory_format(pipe)
    pipe.vae = None
    for apply, check in ((apply_memory_format, check_memory_format), (apply_vae_tiling, check_vae_tiling)):
        with pytest.raises(fluxfire.StepError, match="VAE"):
            apply(pipe)
        assert check(pipe)
        with pytest.raises(fluxfire.NotFluxError):
            check(object())


def test_tiling_is_exact_for_small_pictures_and_not_for_large(flux_class: type) -> None:
    pipe = make_pipe(flux_class)
    tile = pipe.vae.tile_sample_min_size
    more = {"image": picture()[..., :tile, :tile]} if flux_class is FluxKontextPipeline else {}
    small, large = ({"size": (tile, width), **more} for width in (tile, tile + 16))
    baselines = pictures(pipe, **small), pictures(pipe, **large)
    assert apply_vae_tiling(pipe) is pipe
    assert torch.equal(pictures(pipe, **small), baselines[0])
    assert not torch.equal(pictures(pipe, **large), baselines[1])
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(pictures(pipe, **large), baselines[1])


def test_undo_gives_the_tiles_back_as_they_were(pipe: Any, untouched: Callable[[], None]) -> None:
    apply_vae_tiling(pipe)
    assert pipe.vae.use_tiling
    fluxfire.restore_pipeline(pipe)
    untouched()
    pipe.vae.enable_tiling()
    assert "in tiles already" in str(check_vae_tiling(pipe))
    with pytest.raises(fluxfire.StepError, match="already"):
        apply_vae_tiling(pipe)
    assert pipe.vae.use_tiling


@offloads
def test_offload_equals_the_baseline_and_leaves_no_hook(
    pipe: Any, untouched: Callable[[], None], offload: dict[str, Any]
) -> None:
    baseline = pictures(pipe)
    assert apply_offload(pipe, device="cpu", **offload) is pipe
    assert any({"_hf_hook", "_diffusers_hook"} & vars(module).keys() for module in pipe.vae.modules())
    for _ in range(2):
        assert torch.equal(pictures(pipe), baseline)
    fluxfire.restore_pipeline(pipe)
    untouched()


@pytest.mark.parametrize(
    ("flux_class", "offload"),
    [
        pytest.param(FluxPipeline, OFFLOADS["model"], id="text-to-image-model"),
        pytest.param(FluxKontextPipeline, OFFLOADS["blocks"], id="kontext-blocks"),
        pytest.param(FluxPipeline, OFFLOADS["leaves"], id="text-to-image-leaves"),
        pytest.param(FluxPipeline, OFFLOADS["blocks"], id="text-to-image-blocks", marks=pytest.mark.slow),
        pytest.param(FluxKontextPipeline, OFFLOADS["model"], id="kontext-model", marks=pytest.mark.slow),
        pytest.param(FluxKontextPipeline, OFFLOADS["leaves"], id="kontext-leaves", marks=pytest.mark.slow),
    ],
)
def test_offload_over_the_cache_and_compiled_blocks(
    pipe: Any, untouched: Callable[[], None], offload: dict[str, Any]
) -> None:
    if offload.get("offload_type") != "leaf_level":  # its hooks would stand inside the graphs
        fluxfire.apply_compile(pipe, backend="eager")
    fluxfire.apply_cache(pipe, 100, max_consecutive_hits=1)
    baseline, marks = pictures(pipe), fluxfire.cache_stats(pipe).marks()
    assert marks == "#.#"
    apply_offload(pipe, device="cpu", **offload)
    out = pictures(pipe)
    if offload["kind"] == "group":
        assert torch.equal(out, baseline) and fluxfire.cache_stats(pipe).marks() == marks
    fluxfire.restore_pipeline(pipe)
    untouched()


@pytest.mark.parametrize("flux_class", [FluxKontextPipeline], ids=["kontext"])  # FLUX.1's: tests/test_classes.py
def test_all_steps_at_once_come_off_again(pipe: Any, untouched: Callable[[], None]) -> None:
    apply_memory_format(pipe)
    fluxfire.apply_compile(pipe, backend="eager")
    fluxfire.apply_cache(pipe, 0.3)
    apply_vae_tiling(pipe)
    apply_offload(pipe, "group", device="cpu")
    pictures(pipe)
    assert [step.name for step in fluxfire.report(pipe).steps][-2:] == ["vae_tiling", "offload"]
    fluxfire.restore_pipeline(pipe)
    untouched()


def test_sequential_offload_gives_the_same_parameters_back(
    pipe: Any, untouched: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # accelerate cannot compute so from CPU to CPU, but it does put all hooks on, and empty parameters in.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cpu"))
    shared = pipe.vae.decoder.conv_in.weight
    apply_memory_format(pipe)
    apply_offload(pipe, "sequential")
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert pipe.vae.decoder.conv_in.weight is not shared
    fluxfire.restore_pipeline(pipe)
    assert pipe.vae.decoder.conv_in.weight is shared
    untouched()


def test_what_an_earlier_offload_left_stays(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.remove_all_hooks()
    before = attributes(pipe)
    assert ("transformer.", "forward") in before and pipe._all_hooks == []
    for offload in OFFLOADS.values():
        apply_offload(pipe, device="cpu", **offload)
        fluxfire.restore_pipeline(pipe)
        assert attributes(pipe) == before


def test_an_offload_that_fails_half_way_leaves_nothing(pipe: Any, untouched: Callable[[], None]) -> None:
    pipe.vae._supports_group_offloading = False
    with pytest.raises(ValueError, match="does not support group offloading"):
        apply_offload(pipe, "group", device="cpu")
    del pipe.vae._supports_group_offloading
    untouched()


@offloads
def test_a_wrapper_over_the_hook_is_named_and_kept(
    pipe: Any, untouched: Callable[[], None], offload: dict[str, Any]
) -> None:
    apply_offload(pipe, device="cpu", **offload)
    module = pipe.transformer if offload["kind"] == "model" else pipe.transformer.proj_out
    if offload == OFFLOADS["blocks"]:
        module = pipe.transformer.transformer_blocks[1]
    hooked = module.forward

    def somebodys_wrapper(*args: Any, **kwargs: Any) -> Any:
        return hooked(*args, **kwargs)

    module.forward = somebodys_wrapper
    before = attributes(pipe)
    for _ in range(2):
        with pytest.raises(fluxfire.UndoError, match="somebodys_wrapper"):
            fluxfire.restore_pipeline(pipe)
    assert attributes(pipe) == before
    module.forward = hooked
    fluxfire.restore_pipeline(pipe)
    untouched()


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offload_without_an_accelerator_says_so(pipe: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    before = attributes(pipe)
    for device in (None, "cuda:1"):
        assert "needed this machine's accelerator" in str(check_offload(pipe, kind, device=device))
    with pytest.raises(fluxfire.StepError, match="offload: device: found the CPU alone"):
        apply_offload(pipe, kind)
    assert "accelerator" in str(check_offload(pipe, "sequential", device="cpu"))
    assert "accelerator" in str(check_offload(pipe, "group", device="cpu", use_stream=True))
    assert attributes(pipe) == before


def test_offload_without_accelerate_says_what_to_type(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "pip install" in str(check_offload(pipe, "group", device="cpu"))


@pytest.mark.parametrize("users", [*OFFLOADS, "sequential"])
def test_what_the_user_offloaded_is_left_alone(pipe: Any, users: str) -> None:
    if users in ("model", "sequential"):
        getattr(pipe, f"enable_{users}_cpu_offload")(device="cpu")
    else:
        pipe.transformer.enable_group_offload(
            torch.device("cpu"),
            offload_type="leaf_level" if users == "leaves" else "block_level",
            num_blocks_per_group=1,
        )
    before = attributes(pipe)
    for kind in ("model", "sequential", "group"):
        with pytest.raises(fluxfire.StepError, match="offloaded already"):
            apply_offload(pipe, kind, device="cpu")
    assert attributes(pipe) == before


def test_a_component_on_two_devices_is_refused_by_name(pipe: Any) -> None:
    pipe.vae.decoder.to("meta")
    assert "found vae on cpu, meta" in str(check_offload(pipe, "group", device="cpu"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "disk"},
        {"kind": None},
        {"kind": "group", "offload_type": "blocks"},
        {"kind": "model", "use_stream": True},
        {"kind": "sequential", "offload_type": "leaf_level"},
        {"kind": "group", "device": "gpu"},
        {"kind": "group", "device": 1.5},
    ],
    ids=str,
)
def test_bad_arguments_change_nothing(pipe: Any, arguments: dict[str, Any]) -> None:
    before = attributes(pipe)
    with pytest.raises(fluxfire.ArgumentError, match="found"):
        apply_offload(pipe, **arguments)
    assert attributes(pipe) == before


def test_embeddings_that_hooks_copy_miss_the_cache_and_are_right() -> None:
    pipe = make_pipe(FluxPipeline)
    baseline = pictures(pipe)
    fluxfire.apply_cache(pipe, 100)
    apply_offload(pipe, "model", device="cpu")
    assert torch.equal(pictures(pipe, **embeds()), baseline)
    assert fluxfire.cache_stats(pipe).marks() == "###"
