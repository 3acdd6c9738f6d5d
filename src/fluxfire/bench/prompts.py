"""The prompts of `fluxfire tune`: a file of texts or of calls, or the embedded model's examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fluxfire import ArgumentError
from fluxfire.demo.compare import example_jobs


def examples(count: int) -> list[dict[str, Any]]:
    """The embedded model's first cases, half of them edits, with their own seeds."""
    found = example_jobs(count - count // 2)
    jobs = [job for job in found if job.kind == "text"] + [job for job in found if job.kind == "edit"][: count // 2]
    calls: list[dict[str, Any]] = []
    for job in jobs:
        picture: dict[str, Any] = {"image": job.reference} if job.reference else {}
        calls.append({"prompt": job.prompt, "generator": torch.Generator("cpu").manual_seed(job.seed), **picture})
    return calls


def read(path: Path) -> list[dict[str, Any]]:
    """A prompt a line; or, in a .json, a list of texts and of calls, whose `image` is a file beside it.

    Raises:
        ArgumentError: it cannot be read so.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ArgumentError(f"prompts: {path.name}: {error}") from None
    if not isinstance(found, list) or not found or not all(isinstance(item, str | dict) for item in found):
        raise ArgumentError(
            f"prompts: found no list of prompts in {path.name}, needed a prompt a line, or in a .json a list of texts "
            'and of calls such as {"prompt": "in fluent style", "image": "apple.png"}'
        )
    return [_call(item, path) for item in found]


def _call(item: str | dict[str, Any], path: Path) -> dict[str, Any]:
    if isinstance(item, str):
        return {"prompt": item}
    if not isinstance(image := item.get("image"), str):
        return item
    try:
        with Image.open(path.parent / image) as picture:
            return item | {"image": picture.convert("RGB")}
    except (OSError, Image.DecompressionBombError) as error:
        raise ArgumentError(f"prompts: {image} in {path.name} is no picture that can be read: {error}") from None
