"""Does what `fluxfire.tune` finds on the tuning pictures of `front.py` hold on others?

python benchmarks/front_tune.py --work ~/front
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from front import KINDS, Inputs, fresh, inputs

import fluxfire


def jobs(given: Inputs) -> list[dict[str, Any]]:
    """A call for each picture."""
    calls = [given.call(slice(row, row + 1)) for row in range(len(given.seeds))]
    return [call | {"output_type": "pil", "generator": call["generator"][0]} for call in calls]


def main() -> None:
    """Prints a line a kind and budget: what was found, and the errors of pictures not tuned on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--shards", type=int, default=2, help="of ten pictures not tuned on")
    parser.add_argument("--max-errors", type=float, nargs="+", default=[0.01, 0.02])
    options = parser.parse_args()
    torch.set_num_threads(1)
    call = {"num_inference_steps": options.steps}
    for kind in KINDS:
        shards = [inputs(options.work, kind, shard) for shard in range(options.shards)]

        def pictures(pipe: Any, shards: list[Inputs] = shards) -> np.ndarray:
            made = [pipe(**job, **call).images[0] for given in shards for job in jobs(given)]
            return np.stack([np.asarray(one, dtype=np.float64) / 255 for one in made])

        baseline = pictures(fresh())
        for max_error in options.max_errors:
            pipe = fresh()
            setting = fluxfire.tune(
                pipe, jobs(inputs(options.work, kind, -1)), max_error=max_error, call=call, apply=True, progress=False
            )
            errors = ((pictures(pipe) - baseline) ** 2).mean((1, 2, 3)) ** 0.5
            stats = fluxfire.cache_stats(pipe)
            print(
                f"{kind}, {options.steps} steps, max_error={max_error}: threshold {setting.threshold}, "
                f"{1 - setting.computed / setting.calls:.0%} saved on {setting.prompts} prompts in {setting.pictures} "
                f"pictures; on {len(errors)} others {stats.hits / (stats.hits + stats.computed):.0%} saved, "
                f"{np.mean(errors <= max_error):.0%} within, median {np.median(errors):.4f}, worst {errors.max():.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
