"""Forecasts along sigma: exact where the way is a polynomial, corrected where it is not, each sample for itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import attributes, embeds, make_pipe, run
from diffusers import FluxKontextPipeline, FluxPipeline

import fluxfire
from fluxfire import demo
from fluxfire.forecast import Corrector, History
from fluxfire.schedule import _cheapest

SIGMAS = [1.0, 0.93, 0.85, 0.8, 0.7, 0.58, 0.45, 0.33, 0.2, 0.08, 0.0]  # not evenly spaced
SHAPE = (3, 4, 5)


def way(degree: int, sigma: float) -> torch.Tensor:
    """A polynomial of this degree with coefficients of its own for every sample and value."""
    coefficients = torch.randn(degree + 1, *SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return sum(c * sigma**k for k, c in enumerate(coefficients))  # type: ignore[return-value]


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


def test_factors_that_differ_by_sample_are_no_coarser_than_the_one_of_a_sample_alone() -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 4).bfloat16() for _ in range(3)]
    both, alone = History(3), [History(3), History(3)]
    for value, sigma in zip(values, (1.0, 0.9, 0.7), strict=True):
        hits = (False, sigma == 0.9)
        both.push(value, sigma, hits, None if sigma == 1.0 else torch.tensor([i for i in (0, 1) if not hits[i]]))
        for row in (row for row in (0, 1) if not hits[row]):
            alone[row].push(value[row : row + 1], sigma)
    out = both.at(0.37)
    assert all(torch.equal(out[row : row + 1], alone[row].at(0.37)) for row in (0, 1))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_polynomial_is_forecast_exactly(order: int) -> None:
    history = History(order + 1)
    for sigma in SIGMAS[: order + 3]:  # more than it keeps
        history.push(way(order, sigma), sigma)
    assert len(history.values) == order + 1
    assert error(history.at(0.2), way(order, 0.2)) < 1e-9


def test_one_value_is_given_back_to_the_bit() -> None:
    history, value = History(1), way(2, 0.4)
    history.push(value, 0.4)
    assert history.at(0.1) is value


def test_every_sample_has_a_history_of_its_own() -> None:
    history = History(2)
    history.push(way(1, 1.0), 1.0)
    for sigma, hits in ((0.9, (True, False, True)), (0.7, (False, True, True)), (0.6, (True, False, True))):
        missed = torch.tensor([row for row, hit in enumerate(hits) if not hit])
        history.push(way(1, sigma), sigma, hits, missed)
    found = history.at(0.3)
    assert error(found[:2], way(1, 0.3)[:2]) < 1e-9  # two values each, at sigmas of their own
    assert error(found[2], way(1, 1.0)[2]) < 1e-9  # one value: held


@pytest.mark.parametrize("order", [1, 2])
def test_what_forecasts_have_missed_is_made_good_at_the_next_computed_call(order: int) -> None:
    """Where the corrector's polynomial is the way itself, nothing is missing after a computed call."""
    marks = ["####..##.#", "####.#.#.#", "#####.##.#"]  # a schedule for every sample
    residuals, corrector = History(order + 1), Corrector(order + 2)
    total, expected = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    wrong = 0.0
    for i, (sigma, lower) in enumerate(itertools.pairwise(SIGMAS)):
        hits = tuple(row[i] == "." for row in marks)
        missed = torch.tensor([row for row, hit in enumerate(hits) if not hit]) if any(hits) else None
        true, mask = way(order + 1, sigma), torch.tensor(hits).view(-1, 1, 1)
        if not all(hits):
            residuals.push(true, sigma, hits, missed)
        output = torch.where(mask, residuals.at(sigma), true)
        wrong += (output - true).abs().max().item()
        total += (lower - sigma) * corrector.settle(output, (sigma, lower - sigma), hits, missed)
        expected += (lower - sigma) * true
        for row, hit in enumerate(hits):
            if not hit and i >= 4:  # from then on all have had enough computed calls
                assert error(total[row], expected[row]) < 1e-9, (i, row)
    assert wrong > 1e-3, "the forecasts must be wrong, or this shows nothing"


def test_threshold_zero_is_bit_identical_and_undo_restores_every_attribute(flux_class: type) -> None:
    pipe = make_pipe(flux_class)
    baseline, before = run(pipe), attributes(pipe)
    fluxfire.apply_cache(pipe, 0, extrapolate=1)
    assert torch.equal(run(pipe), baseline)
    fluxfire.set_cache_threshold(pipe, math.inf)
    assert not torch.equal(run(pipe), baseline)
    fluxfire.restore_pipeline(pipe)
    assert attributes(pipe).keys() == before.keys()
    assert torch.equal(run(pipe), baseline)


CFG = {"true_cfg_scale": 3.0} | {f"negative_{name}": value for name, value in embeds(seed=6).items()}


@pytest.mark.parametrize("cfg", [False, True], ids=["guidance embedded", "true CFG"])
def test_a_batch_equals_its_samples_alone(cfg: bool) -> None:
    pipe, calls = make_pipe(FluxPipeline), []
    for seed in (11, 12, 13):
        noise = torch.randn(1, 96, 16, generator=torch.Generator().manual_seed(seed)) * (0.1 if seed == 13 else 1)
        calls.append(embeds(seed=seed) | {"latents": noise})
        if cfg:
            calls[-1] |= {f"negative_{name}": value for name, value in embeds(seed=seed + 10).items()}
    more = {"steps": 12} | ({"true_cfg_scale": 3.0} if cfg else {})
    fluxfire.apply_cache(pipe, 1e-9, extrapolate=1)
    run(pipe, **calls[0], **more)
    seen = sorted(d for c in fluxfire.cache_stats(pipe).last_run for d in c.distances if math.isfinite(d))
    fluxfire.set_cache_threshold(pipe, 2.5 * seen[len(seen) // 2])
    alone, hits = [], []
    for call in calls:
        alone.append(run(pipe, **call, **more))
        hits.append([c.hits[0] for c in fluxfire.cache_stats(pipe).last_run])
    batch = {name: torch.cat([call[name] for call in calls]) for name in calls[0]}
    together = run(pipe, **batch, **more, batch=3)
    assert len({tuple(h) for h in hits}) > 1, "the samples must differ, or this shows nothing"
    assert [c.hits for c in fluxfire.cache_stats(pipe).last_run] == list(zip(*hits, strict=True))
    assert error(together, torch.cat(alone)) < 1e-4


def test_a_schedule_says_which_steps_are_computed_in_every_branch() -> None:
    pipe, marks = make_pipe(FluxPipeline), "##.#..#"
    fluxfire.apply_cache(pipe, schedule=marks, extrapolate=1)
    run(pipe, steps=7, **CFG)
    stats = fluxfire.cache_stats(pipe)
    assert stats.marks() == "".join(mark * 2 for mark in marks)
    assert all(math.isnan(d) for c in stats.last_run for d in c.distances), "nothing is compared"
    with pytest.raises(fluxfire.StepError, match="schedule of 7 steps and a run of 8"):
        run(pipe, steps=8)
    fluxfire.set_cache_threshold(pipe, 0)
    run(pipe, steps=7)
    assert fluxfire.cache_stats(pipe).marks() == "#######"


def test_a_scheduler_that_adds_noise_gets_the_forecast_alone() -> None:
    pipe = make_pipe(FluxPipeline)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=True)
    fluxfire.apply_cache(pipe, math.inf, extrapolate=2, max_consecutive_hits=1)
    assert run(pipe, steps=6).isfinite().all()
    assert fluxfire.cache_stats(pipe).hits > 0


@pytest.mark.parametrize(
    "knobs",
    [
        {"extrapolate": 4},
        {"extrapolate": True},
        {"extrapolate": -1},
        {"schedule": ".##"},
        {"schedule": "#x"},
        {"schedule": ""},
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(fluxfire.ArgumentError, match=next(iter(knobs))):
        fluxfire.apply_cache(make_pipe(FluxKontextPipeline), **knobs)


def test_on_the_embedded_model_a_forecast_is_nearer_than_the_held_residual() -> None:
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = demo.call_kwargs() | {"prompt": "teapot, noto style", "output_type": "latent"}
    draw = lambda: pipe(num_inference_steps=20, generator=torch.Generator().manual_seed(0), **call).images  # noqa: E731
    baseline, errors = draw(), []
    for order in (0, 1):
        fluxfire.apply_cache(pipe, extrapolate=order, schedule="##." + ".#" * 8 + "#")
        errors.append(error(draw(), baseline))
        fluxfire.restore_pipeline(pipe)
    assert errors[1] < errors[0] / 2


def test_the_schedule_found_is_the_cheapest_of_all() -> None:
    """Against every choice of the same number of steps, with costs that depend on the two computed calls before."""
    generator = torch.Generator().manual_seed(1)
    table = torch.rand(9, 9, 10, generator=generator).tolist()
    cost = lambda before, after: table[before[-2]][before[-1]][after]  # noqa: E731
    every = [(0, 1, *rest) for rest in itertools.combinations(range(2, 9), 3)]
    total = lambda path: sum(cost(path[:k], path[k]) for k in range(2, 5)) + cost(path, 9)  # noqa: E731
    assert _cheapest(cost, 9, 5, (0, 1)) == min(every, key=total)


def test_find_schedule_leaves_the_pipeline_as_it_was_and_is_nearer_than_even_steps() -> None:
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = demo.call_kwargs() | {"num_inference_steps": 20, "output_type": "latent"}
    draw = lambda: pipe(prompt="teapot, noto style", generator=torch.Generator().manual_seed(0), **call).images  # noqa: E731
    baseline, before = draw(), attributes(pipe)
    marks = fluxfire.find_schedule(pipe, ["waffle, noto style", "red apple, fluent style"], computed=10, call=call)
    assert attributes(pipe).keys() == before.keys()
    assert len(marks) == 20 and marks.count("#") == 10 and marks.startswith("##")
    errors = []
    for schedule in (marks, "##.#.#.#.#.#.#.#.##."):
        fluxfire.apply_cache(pipe, schedule=schedule, extrapolate=2)
        errors.append(error(draw(), baseline))
        fluxfire.restore_pipeline(pipe)
    assert errors[0] < errors[1]


def test_find_schedule_says_what_it_needs() -> None:
    pipe = make_pipe(FluxPipeline)
    call = embeds() | {"num_inference_steps": 4, "height": 32, "width": 48}
    with pytest.raises(fluxfire.ArgumentError, match="found 5, needed 3 to 4"):
        fluxfire.find_schedule(pipe, [call], computed=5)
    with pytest.raises(fluxfire.ArgumentError, match="same for all"):
        fluxfire.find_schedule(pipe, [call, call | {"num_inference_steps": 5}], computed=3)
    with pytest.raises(fluxfire.ArgumentError, match="needed a list"):
        fluxfire.find_schedule(pipe, "red apple", computed=3)
    fluxfire.apply_cache(pipe)
    with pytest.raises(fluxfire.StepError, match="found a cache"):
        fluxfire.find_schedule(pipe, [call], computed=3)
