"""FLUX.1 at full size with random weights, as `fluxfire serve --model serving_model:NAME` takes it.

For throughput, with `benchmarks` on PYTHONPATH: the transformer (12 B), the VAE, CLIP-L and T5-XXL, text encoded for
each request as ever. Pictures are noise. There is no real hit rate, so in the names that end in `half` every other step
is forced to hit. `tiny` and `tiny_half` only show on a CPU that all this works.
"""

from __future__ import annotations

from typing import Any

import torch

import fluxfire
from fluxfire.bench import workloads
from fluxfire.serve.model import Model

HIT_ANYWAY = 1e9  # a threshold that no distance reaches


def full() -> Model:
    """bfloat16, compiled by block."""
    return _make("t2i-1024")


def full_half() -> Model:
    """The same, every other step a hit."""
    return _make("t2i-1024", half=True)


def full_float8() -> Model:
    """The blocks' products in float8, compiled by block."""
    return _make("t2i-1024", float8=True)


def full_float8_half() -> Model:
    """The same, every other step a hit."""
    return _make("t2i-1024", float8=True, half=True)


def tiny() -> Model:
    """A few thousand parameters."""
    return _make("tiny-t2i")


def tiny_half() -> Model:
    """The same, every other step a hit."""
    return _make("tiny-t2i", half=True)


def _make(name: str, *, float8: bool = False, half: bool = False) -> Model:
    workload = workloads.WORKLOADS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = workloads.build(workload, device, dtype)
    encoders = workloads.build_text_encoders(workload, device, dtype)
    assert encoders, "only the embedded model brings its own"
    pipe.register_modules(
        text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=_words(), tokenizer_2=_words()
    )
    if float8:
        fluxfire.apply_quantization(pipe, "float8", keep_original=None)
        fluxfire.apply_fused_qkv(pipe)
    if device.type == "cuda":
        fluxfire.apply_attention(pipe)
        fluxfire.apply_compile(pipe, megacache=None)
    fluxfire.apply_cache(pipe, HIT_ANYWAY if half else 0, max_consecutive_hits=1)
    return Model(pipe, name, workload.side_px, 28, workloads.GUIDANCE, workload.text_tokens)


def _words() -> Any:
    """A tokenizer that knows no word; what it costs the encoders is the same, since prompts are padded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **named)
