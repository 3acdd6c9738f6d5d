"""A picture from text, made fast by one call, and what that call says it did.

python examples/text_to_image.py --tiny    # embedded model, on a CPU
python examples/text_to_image.py           # FLUX.1-dev on a GPU: accept its licence, then `hf auth login`
"""

import argparse
from pathlib import Path

import torch

import fluxfire
from fluxfire import demo

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--prompt", default="a lighthouse at dusk")
parser.add_argument("--tiny", action="store_true", help="the embedded model, 12 steps, uncompiled")
parser.add_argument("--out", type=Path, default=Path("picture.png"))
options = parser.parse_args()

if options.tiny:
    pipe, call = demo.load_pipeline(), {**demo.call_kwargs(), "prompt": "teapot, noto style", "num_inference_steps": 12}
else:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
    call = {"prompt": options.prompt, "num_inference_steps": 28}

fluxfire.optimize_pipeline(pipe, compile=not options.tiny)
pipe(**call, generator=torch.Generator().manual_seed(0)).images[0].save(options.out)
print(fluxfire.report(pipe))
