"""Evaluate a saved pipeline: make the pictures of the committed lists, score them, draw grids.

The real `FluxKontextPipeline` makes them, with 28 steps, float32, noise drawn on the CPU from each case's seed (so it
is the same on every machine). The scores are defined in `training.score`.

Run: ``python -m training.evaluate [--model FOLDER] [--guidance 1.5]`` (seconds on a GPU, some minutes on 2 cores).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from training import data, lists
from training.models import TEXT_LENGTH
from training.score import Bank, score_edit, score_t2i

STEPS = 28
CALL: dict[str, Any] = {
    "height": 128, "width": 128, "max_area": 128 * 128, "_auto_resize": False, "max_sequence_length": TEXT_LENGTH,
    "output_type": "np",
}  # fmt: skip


def make(
    pipe: FluxKontextPipeline, cases: list[dict[str, Any]], references: list[np.ndarray] | None, **call: Any
) -> np.ndarray:
    """The pictures of all cases: uint8, (N, 128, 128, 3)."""
    made, batch = [], 4 if pipe.device.type == "cpu" else 100
    for i in range(0, len(cases), batch):
        part = cases[i : i + batch]
        image = None if references is None else [Image.fromarray(r) for r in references[i : i + batch]]
        noise = [torch.Generator("cpu").manual_seed(case["seed"]) for case in part]
        prompts = [case["prompt"] for case in part]
        true_cfg = {"negative_prompt": [""] * len(part)} if call.get("true_cfg_scale", 1) > 1 else {}
        made.append(pipe(prompt=prompts, image=image, generator=noise, **CALL, **call, **true_cfg).images)
    return (np.concatenate(made) * 255).round().astype(np.uint8)


def rows(columns: list[list[np.ndarray]], per_row: int) -> Image.Image:
    """Grid: each tuple of pictures side by side, `per_row` tuples a row, a thin white line between tuples."""
    cells = [np.concatenate([*pictures, np.full((128, 8, 3), 255, np.uint8)], 1) for pictures in columns]
    return Image.fromarray(
        np.concatenate([np.concatenate(cells[i : i + per_row], 1) for i in range(0, len(cells), per_row)], 0)
    )


def evaluate(bank: Bank, pipe: FluxKontextPipeline, out: Path | None, **call: Any) -> dict[str, float]:
    t2i, edit = lists.read()["t2i"], lists.read()["edit"]
    references = [bank.picture(c["source"], c["name"]) for c in edit["cases"]]
    begun = time.monotonic()
    images = make(pipe, t2i["cases"], None, **call)
    edits = make(pipe, edit["cases"], references, **call)
    scores = score_t2i(bank, images, t2i["cases"], t2i["candidates"]) | score_edit(
        bank, edits, edit["cases"], edit["candidates"]
    )
    if out:
        pairs = [[image, bank.picture(c["style"], c["name"])] for image, c in zip(images, t2i["cases"], strict=True)]
        rows(pairs[:40], 5).save(out / "t2i.png")
        truths = [bank.picture(c["style"], c["name"]) for c in edit["cases"]]
        rows([list(x) for x in zip(references[:40], edits[:40], truths[:40], strict=True)], 4).save(out / "edit.png")
    return {key: round(value, 1) for key, value in scores.items()} | {"made_in_s": round(time.monotonic() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=data.WORK / "model")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--true-cfg", type=float, nargs="+", default=[1.0])
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="1 shows the mean that the model predicts from pure noise"
    )
    parser.add_argument("--out", type=Path, default=data.WORK / "out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = FluxKontextPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    bank, found = Bank(), []
    for guidance in args.guidance:
        for scale in args.true_cfg:
            scores = evaluate(
                bank,
                pipe,
                args.out if not found else None,
                guidance_scale=guidance,
                true_cfg_scale=scale,
                num_inference_steps=args.steps,
            )
            found.append({"steps": args.steps, "guidance_scale": guidance, "true_cfg_scale": scale, **scores})
            print(json.dumps(found[-1]), flush=True)
    (args.out / "scores.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
