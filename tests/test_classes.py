"""Every FLUX class of diffusers with every step: exact, or refused with a reason; and as it was after restoring.

The table is `docs/compatibility.md`; `pytest tests/test_classes.py --write-docs` writes it anew.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import classes
import diffusers
import pytest
import torch
from classes import CASES
from conftest import PAIR_KNOBS
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig

import fluxfire
from fluxfire.blocks import family_of
from fluxfire.optimize import RECIPES
from fluxfire.plan import ORDER

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
TABLE = Path(__file__).parent.parent / "docs" / "compatibility.md"
DENOISING = [name for name, case in CASES.items() if case.family != "none"]
ONE_A_FAMILY = ("FluxKontextPipeline", "Flux2KleinPipeline", "Flux3ModularPipeline")
# Steps that compute the same as before, to the bit: where the cache's threshold is 0, and a picture is one tile.
BIT_IDENTICAL = {"static_blocks", "cache", "prompts", "vae_tiling", "offload"}


@functools.cache  # shared by all tests: each claims that it leaves the pipe as it was
def pipe_of(name: str, encoders: bool = False) -> Any:
    return classes.make(name, encoders=encoders)


@functools.cache
def baseline_of(name: str, encoders: bool = False) -> torch.Tensor | None:
    """The picture before any step; the first run also sets attributes of the pipe."""
    return classes.run(pipe_of(name, encoders)) if name in DENOISING else None


def attributes(pipe: Any) -> dict[tuple[str, ...], Any]:
    """Every instance attribute of the pipe and of all modules of its components, and how every weight lies."""
    found: dict[tuple[str, ...], Any] = {("pipe", key): None for key in vars(pipe)}
    for name, part in pipe.components.items():
        for path, module in part.named_modules() if isinstance(part, torch.nn.Module) else ():
            found |= {(name, path, key): id(value) for key, value in vars(module).items()}
            weights = module.named_parameters(recurse=False)
            found |= {(name, path, key): (id(weight), weight.stride()) for key, weight in weights}
    return found


@contextmanager
def restored(name: str, encoders: bool = False) -> Iterator[Any]:
    """The pipe of this class; what is applied to it inside is taken back, and leaves nothing."""
    pipe, baseline = pipe_of(name, encoders), baseline_of(name, encoders)
    before = attributes(pipe)
    try:
        yield pipe
    finally:
        with suppress(fluxfire.NotOptimizedError, fluxfire.NotFluxError):
            fluxfire.restore_pipeline(pipe)
    assert attributes(pipe) == before
    assert baseline is None or torch.equal(classes.run(pipe), baseline)


@functools.cache
def outcome(name: str, *steps: str) -> str:
    """What these steps do to a pipeline of this class: "exact", "within rounding", or why one is refused."""
    encoders = "prompts" in steps and "Modular" not in name  # prompts refuses modular pipelines
    with restored(name, encoders) as pipe:
        try:
            for step in steps:
                RECIPES[step].apply(pipe, **PAIR_KNOBS[step])
        except (fluxfire.StepError, fluxfire.NotFluxError) as refused:
            return str(refused)
        out, baseline = classes.run(pipe), baseline_of(name, encoders)
        if encoders:
            out = classes.run(pipe)
            assert dict(fluxfire.report(pipe).other)["prompts"].remembered == CASES[name].branches
        difference = ((out - baseline).norm() / baseline.norm()).item()
    if BIT_IDENTICAL.issuperset(steps):
        assert difference == 0
        return "exact"
    if difference > 1e-5:
        assert "approximate" in {RECIPES[step].kind for step in steps if step not in BIT_IDENTICAL}
        return "approximate"
    return "within rounding"


def test_every_class_of_diffusers_is_decided() -> None:
    found = {name for name in dir(diffusers) if re.fullmatch("Flux.*Pipeline", name)}
    assert found == set(CASES), "decide in tests/classes.py how a new class is made and called"


def test_every_step_of_the_order_is_a_column() -> None:
    assert set(RECIPES) == set(PAIR_KNOBS) == set(ORDER)


@pytest.mark.parametrize(("name", "step"), list(itertools.product(CASES, ORDER)))
def test_a_step_is_exact_or_refused_and_undone(name: str, step: str) -> None:
    assert outcome(name, step)


@pytest.mark.parametrize("name", DENOISING)
def test_forced_hits_skip_all_blocks_but_the_first(name: str) -> None:
    pipe, case = pipe_of(name), CASES[name]
    leader, *followers = family_of(pipe).blocks(pipe.transformer)
    entered = {block.attn: 0 for block in (leader, *followers)}

    def count(attention: torch.nn.Module, _: object) -> None:
        entered[attention] += 1

    with restored(name):
        hooks = [attention.register_forward_pre_hook(count) for attention in entered]
        fluxfire.apply_cache(pipe, math.inf)
        out = classes.run(pipe)
        stats = fluxfire.cache_stats(pipe)
        for hook in hooks:
            hook.remove()
    computed = case.branches * case.first_calls
    assert out.isfinite().all() and not torch.equal(out, baseline_of(name))
    assert entered.pop(leader.attn) == stats.computed + stats.hits == case.branches * case.steps
    assert stats.computed == computed
    assert set(entered.values()) == {computed}


@pytest.mark.parametrize("name", DENOISING)
def test_the_one_call_leaves_nothing_out(name: str) -> None:
    with restored(name) as pipe:
        assert fluxfire.plan_pipeline(pipe, cache_threshold=0, compile=False).skips == ()
        fluxfire.optimize_pipeline(pipe, cache_threshold=0, compile=False, strict=True)
        assert torch.equal(classes.run(pipe), baseline_of(name))
        assert fluxfire.report(pipe).family == CASES[name].family


def test_a_pipeline_without_a_denoiser_is_no_flux_pipeline() -> None:
    with (
        restored("FluxPriorReduxPipeline") as pipe,
        pytest.raises(fluxfire.NotFluxError, match="without a transformer"),
    ):
        fluxfire.optimize_pipeline(pipe)


def guided(guider: Any) -> Any:
    pipe = classes.make("Flux2KleinBaseModularPipeline")
    pipe.update_components(guider=guider)
    return pipe


def skipping(block: int) -> Any:
    """A guider that calls once more with a block left out by a hook of diffusers, in most steps."""
    config = LayerSkipConfig(indices=[block], fqn="transformer_blocks")
    return guiders.SkipLayerGuidance(skip_layer_config=config, skip_layer_guidance_start=0, skip_layer_guidance_stop=1)


GUIDERS: dict[str, tuple[Callable[[], Any], int]] = {  # guider: (make, guidance branches)
    "zero-star": (lambda: guiders.ClassifierFreeZeroStarGuidance(zero_init_steps=0), 2),
    # The third call of a step has the tensors of the first.
    "smoothed-energy": (lambda: guiders.SmoothedEnergyGuidance(seg_guidance_layers=[1], seg_guidance_start=0), 3),
    "skips-a-follower": (lambda: skipping(1), 3),
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_each_call_of_a_guider_is_a_branch(guider: str) -> None:
    make, branches = GUIDERS[guider]
    pipe = guided(make())
    baseline = classes.run(pipe)
    fluxfire.apply_cache(pipe, 0)
    assert torch.equal(classes.run(pipe), baseline)
    fluxfire.set_cache_threshold(pipe, math.inf)
    assert classes.run(pipe).isfinite().all()
    computed = [call.branch for call in fluxfire.cache_stats(pipe).last_run if not call.hits[0]]
    assert sorted(computed) == list(range(branches))
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(classes.run(pipe), baseline)


def test_a_guider_that_skips_the_first_block_is_computed() -> None:
    pipe = guided(skipping(0))
    fluxfire.apply_cache(pipe, math.inf)
    assert classes.run(pipe).isfinite().all()


# Of these steps, pairs are tried on the first class; on others by `scripts/test --all`.
BY_FIRST = {"quantization", "attention", "fused_kernels", "modulation_table"}


def pairs(name: str, *, all_: bool) -> list[str]:
    chosen = itertools.combinations(ORDER, 2)
    return [outcome(name, *pair) for pair in chosen if all_ or name == ONE_A_FAMILY[0] or not BY_FIRST & set(pair)]


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_pair_of_steps_is_exact_or_refused_and_undone(name: str) -> None:
    assert all(pairs(name, all_=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISING)
def test_a_pair_of_steps_on_every_class(name: str) -> None:
    assert all(pairs(name, all_=True))


def test_the_table_of_the_docs_is_what_was_found(request: pytest.FixtureRequest) -> None:
    table = _markdown({(name, step): outcome(name, step) for name in CASES for step in ORDER})
    if request.config.getoption("--write-docs"):
        TABLE.write_text(table)
    assert TABLE.read_text() == table, "run: pytest tests/test_classes.py --write-docs, and read the difference"


def _markdown(cells: dict[tuple[str, str], str]) -> str:
    notes: list[str] = []
    rows = []
    for name, case in CASES.items():
        texts = [cells[name, step] for step in ORDER]
        notes += dict.fromkeys(text for text in texts if text not in (*OUTCOMES, *notes))
        shown = [text if text in OUTCOMES else f"no [^{notes.index(text) + 1}]" for text in texts]
        rows.append(f"| {name} | {case.family} | {' | '.join(shown)} |")
    settings = [
        f"- {step}, {RECIPES[step].kind}: `{', '.join(f'{key}={value!r}' for key, value in PAIR_KNOBS[step].items())}`"
        for step in ORDER
    ]
    lines: list[Any] = [
        "# Classes and steps",
        "",
        f"Every FLUX pipeline class of diffusers {diffusers.__version__} with every step, on tiny pipelines with",
        "random weights (float32 on a CPU). Written by `tests/test_classes.py`.",
        "",
        "- exact: the picture is the baseline's to the bit; within rounding: to a relative error of 1e-5. Approximate",
        "  steps stand here with settings at which they change nothing: the cache never hits, a picture is one tile.",
        "- fused_kernels is CUDA's alone; here it runs in the operations of torch that its kernels are held against.",
        "- prompts is tried on pipelines with tiny text encoders, by the second picture of a prompt, for which they",
        "  do not run; the other steps with prompt embeddings.",
        "- After `restore_pipeline`, the attributes and the picture are what they were, in every cell.",
        "- The cache with an infinite threshold skips all blocks but the first, in all calls but the first of each",
        "  guidance branch (Klein-KV with a reference: but the first two).",
        "",
        f"| class | family | {' | '.join(ORDER)} |",
        f"|---|---|{'---|' * len(ORDER)}",
        *rows,
        "",
        *(f"[^{number}]: {note}" for number, note in enumerate(notes, 1)),
        "",
        "The settings:",
        "",
        *(line.replace(": ``", "") for line in settings),
    ]
    return "\n".join(lines) + "\n"


OUTCOMES = ("exact", "within rounding", "approximate")
