"""Pipelines that the server's tests serve: the embedded one, with a log of what it does and faults on request.

Nothing of it is replaced: hooks of torch look on, and raise what a GPU, a driver or a bug would, when a prompt says so.
A prompt that says "held" or "kept" stays in its present denoising step while there is such a file in FLUXTEST_GATES.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from fluxfire import demo
from fluxfire.serve.model import Model


def make() -> Model:
    """The embedded model; FLUXTEST_LOG names a file that gets a line for each denoiser call and each decoding."""
    gates = os.environ["FLUXTEST_GATES"]
    pipe = demo.load_pipeline()
    now: dict[str, Any] = {"prompts": [], "tokens": 0}
    encode_prompt = pipe.encode_prompt

    def encode(*args: Any, **kwargs: Any) -> Any:
        now["prompts"] = list(kwargs["prompt"])
        return encode_prompt(*args, **kwargs)

    pipe.encode_prompt = encode

    def says(word: str) -> bool:
        return any(word in prompt for prompt in now["prompts"])

    def log(line: str) -> None:
        if path := os.environ.get("FLUXTEST_LOG"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{line} {'|'.join(now['prompts'])} {now['tokens']}\n")

    def before_denoiser(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        now["tokens"] = kwargs["hidden_states"].shape[1]
        log("step")
        while any(says(word) and os.path.exists(f"{gates}/{word}") for word in ("held", "kept")):
            time.sleep(0.01)
        if says("hang"):
            time.sleep(3600)
        if says("die"):
            os._exit(9)
        if says("bug"):
            raise ValueError("/etc/passwd: hunter2-hunter2")
        if says("exhaust") or (says("crowd") and len(now["prompts"]) > 1):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def before_decoder(*_: Any) -> None:
        log("decode")
        if says("tiles") and not pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipe.transformer.register_forward_pre_hook(before_denoiser, with_kwargs=True)
    pipe.vae.decoder.register_forward_pre_hook(before_decoder)
    call = demo.call_kwargs()
    return Model(pipe, "tested", demo.SIZE, 4, call["guidance_scale"], call["max_sequence_length"])
