"""What compiled code depends on outside of the model: versions, the GPU or the CPU; and how two of these differ."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fluxfire.store import Manifest


def nearest(fields: dict[str, Any], manifests: list[Manifest]) -> str:
    """The first differing fields against the entry that differs least."""
    differing = [_differences(fields, manifest.fields) for manifest in manifests]
    if not differing:
        return "the store is empty"
    nearest = min(differing, key=len)
    return ", ".join(nearest[:3]) + (f" and {len(nearest) - 3} more" if len(nearest) > 3 else "")


def _differences(here: Any, there: Any, at: str = "") -> list[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        names = [*here, *(name for name in there if name not in here)]
        pairs = [(here.get(name), there.get(name), f"{at}.{name}".lstrip(".")) for name in names]
        return [line for one, other, name in pairs if one != other for line in _differences(one, other, name)]
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        triples = zip(here, there, range(len(here)), strict=True)
        return [line for a, b, index in triples if a != b for line in _differences(a, b, f"{at}[{index}]")]
    return [f"{at.removeprefix('environment.')} {_short(there)}, here {_short(here)}"]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """What kernels for this device depend on outside of the model, by name."""
    from torch._inductor.codecache import torch_key

    fluxfire = sys.modules["fluxfire"].__version__
    found: dict[str, Any] = {"python": platform.python_version(), "machine": f"{sys.platform} {platform.machine()}"}
    found |= {"torch": torch.__version__, "torch_sources": torch_key().hex()}
    found |= {name: _version(name) for name in ("triton", "diffusers", "torchao", "peft")} | {"fluxfire": fluxfire}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "gpu": properties.name}
        found |= {"capability": f"{properties.major}.{properties.minor}", "device": str(_with_index(device))}
    else:
        found |= {"device": str(device)} | _cpu()
    return found


def _with_index(device: torch.device) -> torch.device:
    return torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, str]:
    """The CPU's model, and a digest of its flags where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"cpu": platform.processor()}
    told = dict(reversed([line.split("\t: ", 1) for line in lines if "\t: " in line]))
    values = {name.strip(): value for name, value in told.items()}
    flags = " ".join(sorted(values.get("flags", values.get("Features", "")).split()))
    return {"cpu": values.get("model name", ""), "cpu_flags": hashlib.sha256(flags.encode()).hexdigest()[:16]}
