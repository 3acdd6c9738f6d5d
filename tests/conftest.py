"""Tiny pipelines of the real classes, with random weights: seconds on a CPU, and nothing of diffusers is mocked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

torch.set_num_threads(1)  # tiny models: more threads only wait for each other on a busy machine

# Settings of every step with which pairs are exact and quick.
PAIR_KNOBS: dict[str, dict[str, Any]] = {
    "memory_format": {},
    "quantization": {"weights": "float8"},
    "fused_qkv": {},
    "attention": {"backend": "math"},
    "fused_kernels": {},
    "compile": {"backend": "eager", "vae": True},
    "static_blocks": {},
    "cache": {"threshold": 0},
    "modulation_table": {},
    "prompts": {},
    "vae_tiling": {},
    "offload": {"kind": "group", "device": "cpu"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the generated tables of docs/ anew")


TEXT_TOKENS, CHANNELS, POOLED = 7, 32, 16


def make_pipe(cls: type = FluxPipeline, *, blocks: tuple[int, int] = (2, 2), seed: int = 0) -> Any:
    """A pipeline of `cls` with `blocks` (double, single) random blocks; prompts are given as embeddings."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=CHANNELS,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.5,
    )
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(batch: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    """Prompt embeddings for a call."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(batch, TEXT_TOKENS, CHANNELS, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, POOLED, generator=generator),
    }


def picture(batch: int = 1) -> torch.Tensor:
    """A reference picture for Kontext: (B, 3, H, W) in [0, 1]."""
    return torch.rand(batch, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def run(
    pipe: Any, *, batch: int = 1, size: tuple[int, int] = (32, 48), steps: int = 6, seed: int = 2, **more: Any
) -> Any:
    """Latents of one call, (B, N, C); Kontext gets a reference picture."""
    if isinstance(pipe, FluxKontextPipeline):
        more = {"image": picture(), "max_area": size[0] * size[1], "_auto_resize": False} | more
    arguments = {"height": size[0], "width": size[1], "num_inference_steps": steps, "output_type": "latent"}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**(embeds(batch) | arguments | {"generator": generator} | more)).images


def attributes(pipe: Any) -> dict[tuple[str, str], int]:
    """Every instance attribute of the pipe, its scheduler and all modules, by identity."""
    owners: dict[str, Any] = {"pipe": pipe, "scheduler": pipe.scheduler}
    for part in ("transformer", "vae"):
        owners |= {f"{part}.{name}": module for name, module in getattr(pipe, part).named_modules()}
    return {(name, key): id(value) for name, owner in owners.items() for key, value in vars(owner).items()}


def crash_between_and_within_steps(pipe: Any, fresh: torch.Tensor) -> None:
    """Claims that a run after one that raised, between two steps or within one, is the `fresh` one."""

    def crash(_pipe: Any, step: int, _timestep: Any, kwargs: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=crash)
    assert torch.equal(run(pipe), fresh)

    blow_up = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(pipe)
    blow_up.remove()
    assert torch.equal(run(pipe), fresh)


@pytest.fixture(autouse=True)
def empty_megacache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has compiled, and none writes to the user's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


@pytest.fixture(scope="module")
def kernels_on_cpu() -> Iterator[None]:
    """The fused kernels' step is taken without a GPU too, in torch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluxfire.fused_kernels.ON_CPU", True)
        yield


@pytest.fixture(params=[FluxPipeline, FluxKontextPipeline], ids=["text-to-image", "kontext"])
def flux_class(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture
def pipe(flux_class: type) -> Any:
    return make_pipe(flux_class)


@pytest.fixture(scope="session")
def serve_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of `serve_pipes.make`: a line for each denoiser call and each decoding of the `served` worker."""
    return tmp_path_factory.mktemp("serve") / "log"


@pytest.fixture(scope="session")
def served(serve_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with a warm worker (`serving.Served`), the same for all tests: a worker's start takes seconds."""
    from serving import Served, make_settings, wait_until, with_tests_on_path

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (with_tests_on_path() | {"FLUXTEST_LOG": str(serve_log)}).items():
            patch.setenv(name, value)
        served = Served(make_settings(storage_dir=tmp_path_factory.mktemp("pictures"), warm_sizes=((48, 32),)))
    wait_until(lambda: served.http.get("/readyz").status_code == 200, 900)
    yield served
    served.stop()


@pytest.fixture
def calls() -> Iterator[Callable[..., Any]]:
    """`calls(module)` counts how often a module's forward was entered, without touching its attributes."""
    handles: list[Any] = []

    def count(module: torch.nn.Module) -> list[int]:
        seen = [0]
        handles.append(module.register_forward_pre_hook(lambda *_: seen.__setitem__(0, seen[0] + 1)))
        return seen

    yield count
    for handle in handles:
        handle.remove()
