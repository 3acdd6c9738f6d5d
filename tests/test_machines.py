"""Other machines, as far as this one can tell: no compiler, Windows, macOS, ROCm, and an MPS that takes no float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import classes
import pytest
import torch
from conftest import embeds, make_pipe, run
from torch.utils._python_dispatch import TorchDispatchMode

import fluxfire
from fluxfire.compile import _missing_compiler

SOURCE = str(Path(fluxfire.__file__).parent)


@pytest.mark.parametrize(
    ("platform", "told"), [("win32", "Visual Studio's Build Tools"), ("darwin", "xcode-select"), ("linux", "g\\+\\+")]
)
def test_without_a_compiler_for_the_cpu_the_platforms_own_is_named(
    platform: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own search, with none to be found."""
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp_builder, "_IS_WINDOWS", platform == "win32")
    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(sys, "platform", platform)
    pipe = make_pipe()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(fluxfire.StepError, match=told):
        fluxfire.apply_compile(pipe)
    fluxfire.apply_compile(pipe, backend="eager")
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.parametrize(
    ("platform", "hip", "told"),
    [("linux", None, "pip install triton"), ("win32", None, "triton-windows"), ("linux", "7.0", "ROCm build of torch")],
)
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_gpu_without_triton_is_told_what_to_install(
    device: str, platform: str, hip: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROCm's devices are called "cuda" too."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert told in (_missing_compiler(device) or "")


class Watch(TorchDispatchMode):
    """Keeps which of our lines make a float64 tensor, which MPS has not; diffusers makes its own elsewhere there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.found = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        frame: Any = sys._getframe(1)
        while frame.f_code.co_filename.startswith(str(Path(torch.__file__).parent)):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(SOURCE):
            self.seen += 1
            tensors = out if isinstance(out, list | tuple) else [out]
            if any(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 for tensor in tensors):
                self.found.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        return out


def test_the_cache_makes_no_float64() -> None:
    pipe = make_pipe()
    fluxfire.apply_cache(pipe, 1e-9)
    with Watch() as watch:
        run(pipe, batch=3)
        distances = sorted(fluxfire.cache_stats(pipe).last_run[1].distances)
        fluxfire.set_cache_threshold(pipe, sum(distances[:2]) / 2)
        run(pipe, batch=3, **embeds(3))
    assert "+" in fluxfire.cache_stats(pipe).marks(), "a batch must be split, or this shows little"
    assert watch.seen > 50 and watch.found == []


def test_static_blocks_and_the_cache_of_flux3_make_no_float64() -> None:
    pipe = classes.make("Flux3ModularPipeline")
    fluxfire.apply_static_blocks(pipe)
    fluxfire.apply_cache(pipe, 0.1)
    with Watch() as watch:
        classes.run(pipe)
    assert watch.seen > 10 and watch.found == []
