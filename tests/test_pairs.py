"""Every ordered pair of steps either equals the baseline or stands in the table with its reason.

The table is `docs/step-pairs.md`; `pytest tests/test_pairs.py -m slow --write-docs` writes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR_KNOBS, make_pipe, picture, run
from diffusers import FluxKontextPipeline, FluxPipeline

import fluxfire
from fluxfire.optimize import RECIPES

TABLE = Path(__file__).parent.parent / "docs" / "step-pairs.md"
CLASSES = (FluxPipeline, FluxKontextPipeline)


def outcome(cls: type, first: str, second: str) -> str:
    """What happens when `second` is applied after `first`: "exact", "within rounding", or the reason."""
    torch._dynamo.reset()
    pipe = make_pipe(cls)
    more: dict[str, Any] = {"steps": 2, "output_type": "pt", "size": (32, 32)}  # no larger than a tile
    if cls is FluxKontextPipeline:
        more["image"] = picture()[..., :32]
    baseline = run(pipe, **more)
    RECIPES[first].apply(pipe, **PAIR_KNOBS[first])
    try:
        RECIPES[second].apply(pipe, **PAIR_KNOBS[second])
    except fluxfire.StepError as refused:
        return str(refused)
    for _ in range(2):
        out = run(pipe, **more)
        difference = ((out - baseline).norm() / baseline.norm()).item()
        assert difference <= 1e-5, f"{first}, then {second}: {difference}"
    report = fluxfire.report(pipe)
    assert [step.name for step in report.steps] == [first, second]
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe, **more), baseline)
    return "equals the baseline" if torch.equal(out, baseline) else "equals the baseline within 1e-5"


@pytest.mark.slow
def test_every_ordered_pair_is_exact_or_has_a_reason(request: pytest.FixtureRequest) -> None:
    rows: list[tuple[str, str, str]] = []
    for first in RECIPES:
        for second in RECIPES:
            outcomes = {outcome(cls, first, second) for cls in CLASSES}
            text = min(outcomes, key=len) if all("equals" in one for one in outcomes) else " / ".join(sorted(outcomes))
            rows.append((first, second, text))
    table = _markdown(rows)
    if request.config.getoption("--write-docs"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table)
    assert TABLE.read_text() == table, "run: pytest tests/test_pairs.py -m slow --write-docs, and read the difference"


def _markdown(rows: list[tuple[str, str, str]]) -> str:
    lines: list[Any] = [
        "# Pairs of steps",
        "",
        "What happens when the second step is applied by hand after the first, on tiny FLUX.1 text-to-image and",
        "Kontext pipelines (float32 on a CPU; the cache at threshold 0). Written by `tests/test_pairs.py`.",
        "",
        "| first | second | outcome |",
        "|---|---|---|",
        *(f"| {first} | {second} | {text} |" for first, second, text in rows),
    ]
    return "\n".join(lines) + "\n"
