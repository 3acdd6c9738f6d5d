"""FLUX.1-Kontext: a photo edited by a sentence, at its own size, without the cache and with it.

python examples/edit_a_photo.py --tiny
python examples/edit_a_photo.py photo.png --prompt "make it a watercolour"
"""

import argparse

import torch
from diffusers.utils import load_image

import fluxfire
from fluxfire import demo

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("photo", nargs="?")
parser.add_argument("--prompt", default="make it a watercolour")
parser.add_argument("--tiny", action="store_true", help="the embedded model, 12 steps, uncompiled")
options = parser.parse_args()

if options.tiny:
    pipe, call = demo.load_pipeline(), {**demo.call_kwargs(), "num_inference_steps": 12, "prompt": "in twemoji style"}
    call["image"] = demo.reference("red-apple-noto")
else:
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev", dtype=torch.bfloat16).to("cuda")
    photo = load_image(options.photo)
    width, height = (side // 16 * 16 for side in photo.size)
    call = {"prompt": options.prompt, "image": photo, "width": width, "height": height, "num_inference_steps": 28}
    call |= {"max_area": width * height, "_auto_resize": False}  # else Kontext makes it 1024x1024

fluxfire.optimize_pipeline(pipe, compile=not options.tiny)
for threshold in (0, 0.12):
    fluxfire.set_cache_threshold(pipe, threshold)
    pipe(**call, generator=torch.Generator().manual_seed(0)).images[0].save(f"edit-{threshold}.png")
    print(f"threshold {threshold}: {fluxfire.cache_stats(pipe).marks()} (# computed, . cached)")
