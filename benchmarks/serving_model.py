"""FLUX.1 at full size with random weights, as `fluxfire serve --model serving_model:NAME` takes it.

For throughput, with `benchmarks` on PYTHONPATH: the transformer (12 B), the VAE, CLIP-L and T5-XXL, text encoded for
each request as ever. Pictures are noise. There is no real hit rate, so every other step is forced to hit, unless a
request says the threshold 0. `tiny` only shows on a CPU that all this works. `embedded` is for fuzzing: the embedded
model, whose pictures are small and of two steps when a request says nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

import psutil
import torch

import fluxfire
from fluxfire.bench import workloads
from fluxfire.serve.model import Model, load

HIT_ANYWAY = 1e9  # a threshold that no distance reaches


def full() -> Model:
    """bfloat16, compiled by block."""
    return _make("t2i-1024")


def full_float8() -> Model:
    """The blocks' products in float8, compiled by block."""
    return _make("t2i-1024", float8=True)


def tiny() -> Model:
    """A few thousand parameters."""
    return _make("tiny-t2i")


def embedded() -> Model:
    """The embedded model in a hurry."""
    return replace(load("embedded", "cpu", "float32"), side=32, steps=2)


def _make(name: str, *, float8: bool = False) -> Model:
    from diffusers import AutoencoderKL, FluxPipeline  # noqa: F401
    from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401

    imported = time.time()
    while os.path.exists(f"{os.environ.get('FLUXTEST_GATES')}/held"):  # another model is being measured
        time.sleep(0.1)
    begin = time.time()
    workload = workloads.WORKLOADS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if workload.model == "full" and device.type == "cpu":
        raise fluxfire.ArgumentError("FLUX.1 at full size needs a GPU: serve serving_model:tiny to try it out")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = workloads.build(workload, device, dtype)
    encoders = workloads.build_text_encoders(workload, device, dtype)
    assert encoders, "only the embedded model brings its own"
    pipe.register_modules(
        text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=_words(), tokenizer_2=_words()
    )
    built = time.time()
    if float8:
        fluxfire.apply_quantization(pipe, "float8", keep_original=None)
    fluxfire.apply_fused_qkv(pipe)
    if device.type == "cuda":
        fluxfire.apply_fused_kernels(pipe)
        fluxfire.apply_compile(pipe, megacache=None)
    fluxfire.apply_cache(pipe, HIT_ANYWAY, max_consecutive_hits=1)
    took = {"imports_s": imported - psutil.Process().create_time(), "weights_s": built - begin}
    took |= {"steps_s": time.time() - built}
    print("serving_model took", json.dumps({key: round(value, 1) for key, value in took.items()}), file=sys.stderr)
    return Model(pipe, name, workload.side_px, 28, workloads.GUIDANCE, workload.text_tokens)


def _words() -> Any:
    """A tokenizer that knows no word; what it costs the encoders is the same, since prompts are padded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **named)
