"""Every ordered pair of steps either equals the baseline or stands in the table with its reason.

The table is `docs/step-pairs.md`; `pytest tests/test_pairs.py -m slow --write-docs` writes it anew.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import classes
import pytest
import torch
from conftest import PAIR_KNOBS, make_pipe, picture, run
from diffusers import Flux3ModularPipeline, FluxKontextPipeline, FluxPipeline

import fluxfire
from fluxfire import demo
from fluxfire.optimize import RECIPES
from fluxfire.plan import ORDER

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
TABLE = Path(__file__).parent.parent / "docs" / "step-pairs.md"
CLASSES = (FluxPipeline, FluxKontextPipeline)

# Steps whose settings decide what they go together with: (as the table says it, settings).
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "compile": [
        ("compile, by block", {"backend": "eager"}),
        ("compile, with the VAE's decoder", {"backend": "eager", "vae": True}),
        ("compile, the whole denoiser", {"backend": "eager", "scope": "denoiser"}),
    ],
    "offload": [
        ("offload, model", {"kind": "model", "device": "cpu"}),
        ("offload, group by blocks", {"kind": "group", "device": "cpu"}),
        ("offload, group by leaves", {"kind": "group", "device": "cpu", "offload_type": "leaf_level"}),
        ("offload, sequential", {"kind": "sequential"}),
    ],
}

ON_GPU = "on an accelerator alone; `tests/gpu/test_offload.py` tries it beside memory_format and vae_tiling"


def variants(name: str) -> list[tuple[str, dict[str, Any]]]:
    return VARIANTS.get(name, [(name, PAIR_KNOBS[name])])


def outcome(cls: type, first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]) -> str:
    """What happens when `second` is applied after `first`: that it equals the baseline, or the reason."""
    torch._dynamo.reset()
    encoders = cls is FluxPipeline and "prompts" in (first[0], second[0])
    pipe, draw = classes.make(cls.__name__, encoders=encoders), classes.run
    if cls in CLASSES and not encoders:
        more: dict[str, Any] = {"steps": 2, "output_type": "pt", "size": (32, 32)}  # no larger than a tile
        more |= {"image": picture()[..., :32]} if cls is FluxKontextPipeline else {}
        pipe, draw = make_pipe(cls), functools.partial(run, **more)
    baseline = draw(pipe)
    expected, tolerance = baseline, 1e-5
    if alone := [knobs for name, knobs in (first, second) if name == "quantization"]:
        fluxfire.apply_quantization(pipe, **alone[0])
        expected, tolerance = draw(pipe), 1e-2  # a rounding error beside it may tip a number into the next 8-bit one
        fluxfire.restore_pipeline(pipe)
    try:
        for name, knobs in (first, second):
            RECIPES[name].apply(pipe, **knobs)
    except fluxfire.StepError as refused:
        return ON_GPU if "found the CPU alone" in str(refused) else str(refused)
    for _ in range(2):
        out = draw(pipe)
        difference = ((out - expected).norm() / expected.norm()).item()
        assert difference <= tolerance, f"{first}, then {second}: {difference}"
    report = fluxfire.report(pipe)
    assert [step.name for step in report.steps] == [first[0], second[0]]
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(draw(pipe), baseline)
    what = "quantization alone" if alone else "the baseline"
    return f"equals {what}" if torch.equal(out, expected) else f"equals {what} within {tolerance:g}"


def test_a_pair_out_of_order_is_refused_with_the_order() -> None:
    for index, second in enumerate(ORDER):
        for first in ORDER[index:]:
            pipe = make_pipe(FluxPipeline) if first != "static_blocks" else classes.make("Flux3ModularPipeline")
            pipe = demo.load_pipeline() if first == "prompts" else pipe  # which has text encoders
            RECIPES[first].apply(pipe, **PAIR_KNOBS[first])
            told = "applied already: " if first == second else f"apply_{second}, apply_{first}"
            with pytest.raises(fluxfire.StepError, match=told):
                RECIPES[second].apply(pipe, **PAIR_KNOBS[second])


@pytest.mark.slow
def test_every_pair_in_order_is_exact_or_has_a_reason(request: pytest.FixtureRequest) -> None:
    rows: list[tuple[str, str, str]] = []
    for index, first in enumerate(ORDER):
        for second in ORDER[index + 1 :]:
            for label, knobs in variants(first):
                for other, others in variants(second):
                    tried = (FluxPipeline,) if "prompts" in (first, second) else CLASSES
                    tried = (Flux3ModularPipeline,) if "static_blocks" in (first, second) else tried
                    outcomes = {outcome(cls, (first, knobs), (second, others)) for cls in tried}
                    assert len(outcomes) == 1 or all("equals" in one for one in outcomes)
                    rows.append((label, other, max(outcomes, key=len)))
    table = _markdown(rows)
    if request.config.getoption("--write-docs"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table)
    assert TABLE.read_text() == table, "run: pytest tests/test_pairs.py -m slow --write-docs, and read the difference"


def _markdown(rows: list[tuple[str, str, str]]) -> str:
    lines: list[Any] = [
        "# Pairs of steps",
        "",
        "What happens when the second step is applied after the first, on tiny FLUX.1 text-to-image and Kontext",
        "pipelines (static_blocks: FLUX.3; float32 on a CPU, pictures no larger than a tile, cache at threshold 0).",
        "Beside quantization, which is approximate, the picture is that of quantization alone. Beside prompts (tiny",
        "text encoders, text to image alone) it is the second of a prompt, for which they do not run.",
        "fused_kernels is CUDA's alone; here it runs in the operations of torch that its kernels are held against.",
        "Steps out of order, or twice, are refused with the order. Written by `tests/test_pairs.py`.",
        "",
        "| first | second | outcome |",
        "|---|---|---|",
        *(f"| {first} | {second} | {text} |" for first, second, text in rows),
    ]
    return "\n".join(lines) + "\n"
