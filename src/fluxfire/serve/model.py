"""In the worker: which pipeline is served, and what a request may ask of it.

A model is named in one of three ways: `embedded`; a folder or a repository of the Hugging Face Hub, for
`from_pretrained`; or `module:function`, whose function makes the pipeline, for everything else (LoRAs, quantization).
A pipeline that the function has optimized is served as it is; any other is optimized as the settings say.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from fluxfire import ArgumentError, demo

# Classes whose call the server knows, and whether it takes a picture to edit.
CLASSES: Final = {"FluxPipeline": False, "FluxKontextPipeline": True}

# What the page offers, the first style chosen; the embedded model knows words for emoji and nothing else.
STYLES: Final = ("", "photograph", "watercolour", "oil painting", "pencil drawing", "pixel art", "3D render")
EXAMPLES: Final = ("a lighthouse in a storm", "a fox reading under a lamp", "a street market after rain")
EMBEDDED_EXAMPLES: Final = ("octopus", "sailboat", "pineapple", "circus tent", "frog", "cupcake")


@dataclass(slots=True)
class Model:
    """A pipeline and how to call it."""

    pipe: Any
    name: str
    side: int = 1024
    steps: int = 28
    guidance: float = 3.5
    text_tokens: int = 512
    call: dict[str, Any] = field(default_factory=dict)  # arguments of every call
    styles: tuple[str, ...] = STYLES
    examples: tuple[str, ...] = EXAMPLES

    @property
    def takes_picture(self) -> bool:
        """Whether it edits."""
        return CLASSES[type(self.pipe).__name__]

    @property
    def multiple(self) -> int:
        """Sides of pictures are multiples of this: the autoencoder's factor, times 2 for a packed token."""
        return int(self.pipe.vae_scale_factor) * 2


def load(name: str, device: str, dtype: str) -> Model:
    """Loads a model onto its device.

    Raises:
        ArgumentError: its class is none that the server knows, or diffusers cannot load it.
    """
    from diffusers.utils import logging

    logging.disable_progress_bar()  # its parts would be lines of the log
    number_type = getattr(torch, dtype)
    if name == "embedded":
        model = _embedded(number_type)
    elif ":" in name:
        module, function = name.split(":", 1)
        made = getattr(importlib.import_module(module), function)()
        model = made if isinstance(made, Model) else Model(made, function)
    else:
        model = Model(pretrained(name, number_type), name.rstrip("/").rsplit("/", 1)[-1])
    found = type(model.pipe).__name__
    if found not in CLASSES:
        raise ArgumentError(f"model: found a {found}, needed one of {', '.join(CLASSES)}")
    if ":" not in name:
        model.pipe.to(device)  # a function has put it where it belongs
    model.pipe.set_progress_bar_config(disable=True)
    return model


def pretrained(name: str, dtype: torch.dtype) -> Any:
    """A pipeline from a folder or the Hub.

    Raises:
        ArgumentError: diffusers cannot load it, and why.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ArgumentError(
            f"model: found {name!r}, needed a folder of diffusers, or a repository on the Hub such as "
            f"black-forest-labs/FLUX.1-dev (with HF_TOKEN set, where it asks for that): {why}"
        ) from error


def _embedded(dtype: torch.dtype) -> Model:
    call = demo.call_kwargs()
    guidance, tokens = call["guidance_scale"], call["max_sequence_length"]
    return Model(
        demo.load_pipeline(dtype=dtype),
        "fluxfire-embedded",
        demo.SIZE,
        28,
        guidance,
        tokens,
        styles=demo.STYLES[::-1],
        examples=EMBEDDED_EXAMPLES,
    )
