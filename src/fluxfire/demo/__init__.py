"""The embedded model: a real, trained FLUX.1-Kontext pipeline of 12 M parameters, for demos, tests and benchmarks.

It is loaded like any other, with no special code:

    pipe = FluxKontextPipeline.from_pretrained(fluxfire.demo.model_path())
    call = fluxfire.demo.call_kwargs()
    image = pipe(prompt="teapot, noto style", **call).images[0]
    edited = pipe(image=fluxfire.demo.reference("red-apple-noto"), prompt="in twemoji style", **call).images[0]

It draws emoji at 128 x 128 in three styles: ``noto``, ``twemoji``, ``fluent``. Prompts are lower case:

- text to image: ``<words of the name>, <style> style``;
- edit: ``in <style> style``, with a picture of the thing in another style.

How it was made and how well it does: ``docs/embedded-model.md``. Licences of the pictures: ``README.md`` here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from diffusers import FluxKontextPipeline
    from PIL.Image import Image

__all__ = ["SIZE", "STYLES", "Case", "call_kwargs", "load_pipeline", "model_path", "prompts", "reference", "references"]

SIZE = 128
STYLES = ("noto", "twemoji", "fluent")
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Case:
    """One evaluation case.

    Attributes:
        prompt: What the pipeline is given.
        name: The thing drawn, as the emoji sets name it.
        style: The style asked for.
        source: The style of the reference picture; None for text to image.
        seed: For a `torch.Generator` on the CPU.
    """

    prompt: str
    name: str
    style: str
    source: str | None
    seed: int


def model_path() -> Path:
    """The folder of the weights, for `from_pretrained`."""
    return _HERE / "model"


def call_kwargs() -> dict[str, Any]:
    """What a call of the pipeline needs at this size; a fresh dict.

    Without `max_area` and `_auto_resize=False` the Kontext pipeline would scale everything to 1024 x 1024. The model is
    trained with guidance from 1 to 4.
    """
    return {
        "height": SIZE,
        "width": SIZE,
        "max_area": SIZE * SIZE,
        "_auto_resize": False,
        "max_sequence_length": 24,
        "guidance_scale": 2.5,
    }


def load_pipeline(dtype: "torch.dtype | None" = None) -> "FluxKontextPipeline":
    """The pipeline on the CPU, in `dtype` (default float32)."""
    import torch
    from diffusers import FluxKontextPipeline

    pipe: FluxKontextPipeline = FluxKontextPipeline.from_pretrained(str(model_path()), dtype=dtype or torch.float32)
    return pipe


def prompts(split: Literal["t2i", "edit"]) -> tuple[Case, ...]:
    """The 200 committed cases of one job: training names for ``t2i``, held-out names for ``edit``."""
    cases = json.loads((_HERE / "prompts.json").read_text(encoding="utf-8"))[split]["cases"]
    return tuple(Case(c["prompt"], c["name"], c["style"], c.get("source"), c["seed"]) for c in cases)


def references() -> tuple[str, ...]:
    """The names of the shipped reference pictures, ``<thing>-<style>``; all are held-out things."""
    return tuple(sorted(path.stem for path in (_HERE / "references").glob("*.png")))


def reference(name: str) -> "Image":
    """A shipped reference picture, RGB, 128 x 128, for the `image` of an edit.

    Raises:
        KeyError: `name` is none of `references()`.
    """
    from PIL import Image

    if name not in references():
        raise KeyError(f"no reference picture {name!r}; there are: {', '.join(references())}")
    with Image.open(_HERE / "references" / f"{name}.png") as image:
        return image.convert("RGB")
