"""A batch in which each picture decides for itself, with the decisions shown while it runs.

python examples/batch_and_progress.py --tiny
"""

import argparse
from typing import Any

import torch

import fluxfire
from fluxfire import demo

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true", help="8 steps, uncompiled")
options = parser.parse_args()

pipe = demo.load_pipeline()
pipe.set_progress_bar_config(disable=True)
fluxfire.optimize_pipeline(pipe, cache_threshold=0.2, compile=not options.tiny)


def show(pipe: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """What the cache decided for each picture, after each step."""
    call = fluxfire.cache_stats(pipe).last_run[-1]
    print(f"step {step:2}:", "  ".join("cached  " if hit else "computed" for hit in call.hits))
    return values


prompts = ["teapot, noto style", "mountain, twemoji style", "rocket, fluent style"]
call = demo.call_kwargs() | {"num_inference_steps": 8 if options.tiny else 28, "callback_on_step_end": show}
generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
for name, image in zip(prompts, pipe(prompt=prompts, generator=generators, **call).images, strict=True):
    image.save(f"{name.split(',')[0]}.png")
