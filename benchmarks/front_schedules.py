"""Prints the candidates of `SCHEDULES` in `front_methods.py`, by the costs of `fluxfire.find_schedule`.

    python benchmarks/front_schedules.py --work ~/front

`find_schedule` itself makes the pictures anew for each schedule; here one run of the tuning pictures serves them all.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Final

import torch
from front import KINDS, fresh, inputs

from fluxfire.schedule import _cheapest, _costs, _Record

COMPUTED: Final = {28: (14, 10, 7, 6, 5), 50: (25, 18, 10, 9, 8, 7)}


def main() -> None:
    """A line a schedule: kind, calls, warmup steps, and what `SCHEDULES` takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    for steps, kind in itertools.product(COMPUTED, KINDS):
        pipe, given = fresh(), inputs(options.work, kind, -1)
        record = _Record(pipe)
        with pipe.transformer.register_forward_hook(record, with_kwargs=True), torch.no_grad():
            pipe(num_inference_steps=steps, **given.call(slice(None)))
        record.close()
        for computed, order, warmup in itertools.product(COMPUTED[steps], (1, 2), (1, 2)):
            cost = _costs(record.gram, record.sigmas, order + 1)
            marked = _cheapest(cost, steps, computed, tuple(range(warmup)))
            marks = "".join("#" if step in marked else "." for step in range(steps))
            print(f'{kind} {computed} {warmup} ("{marks}", {order}),', flush=True)


if __name__ == "__main__":
    main()
