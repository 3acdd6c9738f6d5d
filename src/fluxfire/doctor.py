"""`fluxfire doctor`: what this machine has of what fluxfire needs, what is missing, and what to type for it.

It changes nothing and fetches nothing. Of a token it tells that there is one and where it was found, never what it is.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "optional"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        what: Its name.
        state: "ok"; "missing": `optimize_pipeline` needs it to do its best; "optional": something else needs it.
        found: What is there, or what is not, in words.
        type: What to type to get it; "" where nothing is missing.
    """

    what: str
    state: State
    found: str
    type: str = ""


def examine() -> tuple[Finding, ...]:
    """Everything that is looked for, in the order in which one needs it."""
    return (*_libraries(), *_gpu(), _compiler(), *_extras(), _store(), _token())


def as_text(findings: tuple[Finding, ...]) -> str:
    """A line for each finding, and one more with what to type."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<8}  {finding.what:<{width}}  {finding.found}")
        if finding.type:
            lines.append(f"{'':<8}  {'':<{width}}  -> {finding.type}")
    return "\n".join(lines)


def _libraries() -> Iterator[Finding]:
    import fluxfire

    text = f"{fluxfire.__version__}, Python {platform.python_version()} on {sys.platform}"
    if _version("fluxfire") is None:
        yield Finding("fluxfire", "missing", f"{text}, on the path but not installed", "pip install . in its folder")
        return
    yield Finding("fluxfire", "ok", text)
    for requirement, missing in _required(""):
        found = _version(requirement)
        if missing:
            yield Finding(
                requirement, "missing", f"found {found or 'none'}, needed {missing}", f'pip install "{missing}"'
            )
        else:
            yield Finding(requirement, "ok", found or "")


def _gpu() -> Iterator[Finding]:
    """The driver, whether torch can use it, and each GPU."""
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "the CPU alone"
    drivers = _nvidia_smi()
    if torch.accelerator.is_available():
        yield Finding("driver", "ok", f"{drivers or 'found by torch'}; torch is built for {built_for}")
        for index in range(torch.accelerator.device_count()):
            yield Finding(f"GPU {index}", "ok", _describe_gpu(index))
        return
    if drivers is None:
        yield Finding("GPU", "optional", "none: pipelines run on the CPU, which is for trying things out")
    elif torch.version.cuda is None:
        yield Finding(
            "driver",
            "missing",
            f"{drivers}, but torch is built for {built_for}",
            "pip uninstall torch, then pip install torch as https://pytorch.org/get-started/locally says for CUDA",
        )
    else:
        what = f"{drivers}, but torch, built for {built_for}, cannot use it: {_why_no_cuda()}"
        yield Finding("driver", "missing", what, "nvidia-smi must work; update the driver, then start again")


def _nvidia_smi() -> str | None:
    """The driver as nvidia-smi tells it; None where there is no such command."""
    if not (command := shutil.which("nvidia-smi")):
        return None
    query = [command, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return f"nvidia-smi fails: {' '.join((done.stderr or done.stdout).split())[:200]}"
    return f"NVIDIA {lines[0].split(',')[0]}, {len(lines)} GPU{'s' * (len(lines) > 1)}"


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "it finds no GPU; is CUDA_VISIBLE_DEVICES set?"


def _describe_gpu(index: int) -> str:
    import torch

    if not torch.cuda.is_available():
        return str(torch.accelerator.current_accelerator())
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, {capability}"


def _compiler() -> Finding:
    """What `apply_compile` needs on this machine."""
    import torch

    from fluxfire.compile import _missing_compiler

    device = torch.accelerator.current_accelerator(check_available=True)
    if reason := _missing_compiler(device.type if device else "cpu"):
        found, _, how = reason.rpartition(": ")
        return Finding("compiler", "missing", found, how)
    if device is not None:
        return Finding("compiler", "ok", f"Triton {_version('triton') or ''}".rstrip())
    from torch._inductor.cpp_builder import get_cpp_compiler

    return Finding("compiler", "ok", get_cpp_compiler())


def _extras() -> Iterator[Finding]:
    if _version("fluxfire") is None:
        return
    for extra in metadata.metadata("fluxfire").get_all("Provides-Extra") or ():
        if extra in ("dev", "docs"):  # of those who work on fluxfire
            continue
        lacking = [missing for _, missing in _required(extra) if missing]
        how = f"pip install 'fluxfire[{extra}]'"
        if extra == "para-attn":  # pip >= 26.3 refuses its metadata
            how = "uv pip install para-attn"
        found = f"needs {', '.join(lacking)}" if lacking else "installed"
        yield Finding(f"[{extra}]", "optional" if lacking else "ok", found, how if lacking else "")


def _required(extra: str) -> Iterator[tuple[str, str]]:
    """What the package asks for with this extra alone: names, and what is missing of each, "" if nothing."""
    from packaging.requirements import Requirement

    for line in metadata.requires("fluxfire") or ():
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        with_extra = marker is None or marker.evaluate({"extra": extra})
        if not with_extra or (extra and always):
            continue
        if requirement.name == "fluxfire":  # an extra that contains others
            for other in requirement.extras:
                yield from _required(other)
            continue
        found = _version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        yield requirement.name, "" if fits else f"{requirement.name}{requirement.specifier}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _store() -> Finding:
    """The mega-cache's folder, looked at only where it exists: nothing is made here."""
    from fluxfire.megacache import default_folder
    from fluxfire.store import Store, StoreError

    path = default_folder()
    if not path.exists():
        return Finding("mega-cache", "ok", f"{path}, made when something is kept there")
    try:
        store = Store(path)
        count, size = len(store.keys()), store.size()
        store.close()
    except (StoreError, OSError) as error:
        return Finding("mega-cache", "missing", str(error), "pass megacache=PATH, a folder that only you can write")
    free = shutil.disk_usage(path).free
    text = f"{path}, {count} artifacts, {size / 2**20:.1f} MiB; {free / 2**30:.0f} GiB free on that disk"
    return Finding("mega-cache", "ok", text)


def _token() -> Finding:
    """Whether there is a token for gated weights, and where; never the token."""
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN"):
        return Finding("HF_TOKEN", "ok", "set (not shown)")
    if get_token():
        return Finding("HF_TOKEN", "ok", "not set; a token was kept by `hf auth login` (not shown)")
    what = "not set: FLUX.1-Kontext-dev and other gated weights cannot be fetched"
    return Finding("HF_TOKEN", "optional", what, "accept the licence on the model's page, then: hf auth login")
