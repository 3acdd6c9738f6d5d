"""Each step by hand: what would refuse, what each one changes in the picture, and the way back, to the bit.

python examples/step_by_step.py --tiny
"""

import argparse

import torch

import fluxfire
from fluxfire import demo

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true", help="6 steps, uncompiled")
options = parser.parse_args()

pipe = demo.load_pipeline()
call = demo.call_kwargs() | {"prompt": "teapot, noto style", "num_inference_steps": 6 if options.tiny else 28}


def draw() -> torch.Tensor:
    """The same picture every time: (1, 3, H, W) in [0, 1]."""
    return pipe(**call, output_type="pt", generator=torch.Generator().manual_seed(0)).images


before = draw()
print("static blocks:", fluxfire.check_static_blocks(pipe))
steps = [fluxfire.apply_memory_format, fluxfire.apply_fused_qkv, fluxfire.apply_compile, fluxfire.apply_cache]
for apply in steps:
    if not (options.tiny and apply is fluxfire.apply_compile):
        apply(pipe)
        print(f"{apply.__name__:<20} largest difference in a pixel: {(draw() - before).abs().max():.1e}")
fluxfire.restore_pipeline(pipe)
print("restored, to the bit:", torch.equal(draw(), before))
