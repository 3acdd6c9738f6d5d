"""`tune` keeps its budget, counts its pictures and leaves no trace; a setting refuses what it was not found on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classes
import numpy as np
import pytest
import torch
from conftest import attributes, embeds, make_pipe, picture, run
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL import Image

import fluxfire
from fluxfire import ArgumentError, Setting, Trial, demo
from fluxfire.patches import handle_of
from fluxfire.setting import fingerprint
from fluxfire.tuning import LADDER, _Budget

SIZE = {"height": 32, "width": 48, "num_inference_steps": 6}
PROMPTS = [embeds(seed=seed) for seed in (1, 2, 3)]
RUNGS = (0.3, 0.4, 0.5, 0.6)  # random weights have distances of 0.3 and more


def tune(pipe: Any, prompts: Any = PROMPTS, **more: Any) -> Setting:
    """On a tiny pipeline; an edit's pictures come with the prompts."""
    if isinstance(pipe, FluxKontextPipeline):
        prompts = [{"image": picture(), "max_area": 32 * 48, "_auto_resize": False} | prompt for prompt in prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluxfire.tuning.LADDER", RUNGS)
        return fluxfire.tune(pipe, prompts, **({"call": SIZE} | more))


def embedded_prompts(*which: int) -> list[dict[str, Any]]:
    cases = demo.prompts("t2i")
    return [{"prompt": cases[i].prompt, "generator": torch.Generator().manual_seed(cases[i].seed)} for i in which]


def rms(a: Image.Image, b: Image.Image) -> float:
    return float(np.sqrt(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)) / 255)


@pytest.fixture(scope="module")
def embedded() -> Any:
    return demo.load_pipeline()


STEPS = 6
CALL = demo.call_kwargs() | {"num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def found(embedded: Any) -> tuple[Setting, list[Trial]]:
    """An error of 1 % on four prompts of the embedded model; what was made on the way."""
    trials: list[Trial] = []
    setting = fluxfire.tune(embedded, embedded_prompts(0, 1, 2, 3), max_error=0.01, call=CALL, on_trial=trials.append)
    return setting, trials


def test_the_budget_is_kept_on_every_prompt(found: tuple[Setting, list[Trial]]) -> None:
    setting, trials = found
    chosen = [trial for trial in trials if trial.threshold == setting.threshold]
    assert sorted(trial.prompt for trial in chosen) == [0, 1, 2, 3]
    assert setting.error == setting.worst_error == max(trial.error for trial in chosen) <= 0.01
    assert (setting.calls, setting.computed) == (4 * STEPS, sum(trial.computed for trial in chosen))
    assert setting.threshold > 0 and setting.saved > 0.2 and setting.steps == STEPS


def test_the_next_threshold_is_over_the_budget(found: tuple[Setting, list[Trial]]) -> None:
    setting, trials = found
    above = [t for t in trials if t.threshold == LADDER[LADDER.index(setting.threshold) + 1]]
    assert [trial.error > 0.01 for trial in above][-1:] == [True]


def test_errors_are_of_the_pictures_and_grow_with_the_threshold_on_the_whole(
    found: tuple[Setting, list[Trial]],
) -> None:
    _, trials = found
    for index in range(4):
        mine = sorted((trial for trial in trials if trial.prompt == index), key=lambda trial: trial.threshold)
        assert mine[0].threshold == 0 and mine[0].computed == STEPS
        assert [t.error for t in mine] == pytest.approx([rms(mine[0].pictures[0], t.pictures[0]) for t in mine])
        assert [t.computed for t in mine] == sorted((t.computed for t in mine), reverse=True)
    whole = [[t.error for t in trials if t.threshold == threshold] for threshold in LADDER]
    means = [sum(errors) / 4 for errors in whole if len(errors) == 4]
    assert len(means) >= 2 and means == sorted(means)


def test_a_threshold_that_is_too_high_costs_few_pictures(found: tuple[Setting, list[Trial]]) -> None:
    setting, trials = found
    assert setting.pictures == len(trials)
    tried = {trial.threshold for trial in trials} - {0.0}
    for threshold in tried:
        race = [trial for trial in trials if trial.threshold == threshold]
        over = [trial.error > 0.01 for trial in race]
        if threshold > setting.threshold:
            assert over == [False] * (len(race) - 1) + [True]  # nothing was made after it
        else:
            assert over == [False] * 4
    assert len(trials) < 4 * (1 + len(tried))


def test_the_setting_holds_on_prompts_that_it_has_not_seen(embedded: Any, found: tuple[Setting, list[Trial]]) -> None:
    """Half of four more within 1 % and all within 3 %: a quantile of four prompts promises no more."""
    pictures = {}
    for threshold in (0, found[0]):
        fluxfire.apply_cache(embedded, threshold)
        pictures[threshold] = [embedded(**CALL | job).images[0] for job in embedded_prompts(10, 11, 12, 13)]
        hits = fluxfire.cache_stats(embedded).hits
        fluxfire.restore_pipeline(embedded)
    errors = [rms(a, b) for a, b in zip(*pictures.values(), strict=True)]
    print(f"held out: {errors}, {hits} of {4 * STEPS} calls hit")
    assert hits > 4 * STEPS * 0.2 and sum(error > 0.01 for error in errors) <= 2 and max(errors) < 0.03


@pytest.mark.parametrize(
    ("quantile", "prompts", "may_exceed"), [(0.9, 9, 0), (0.9, 10, 1), (0.9, 30, 3), (1, 30, 0), (0.5, 3, 1)]
)
def test_a_quantile_leaves_that_many_prompts(quantile: float, prompts: int, may_exceed: int) -> None:
    trials = [Trial(index, 0.1, (), 0.02, 8, 4) for index in range(prompts)]
    budget = _Budget(0.01, None, quantile, trials)
    assert not budget.lost(trials[:may_exceed]) and budget.lost(trials[: may_exceed + 1])


def test_a_speedup_is_reached_by_the_smallest_threshold_that_does(pipe: Any) -> None:
    trials: list[Trial] = []
    setting = tune(pipe, speedup=1.5, on_trial=trials.append)
    assert setting.computed * 1.5 <= setting.calls == 3 * 6
    assert 0 < setting.error <= setting.worst_error
    below = [t for t in trials if t.threshold == RUNGS[RUNGS.index(setting.threshold) - 1]]
    # Given up when what is left cannot reach it any more, since a picture's first call is always computed.
    assert sum(trial.computed for trial in below) + 3 - len(below) > 12
    assert len(below) < 3 or sum(trial.computed for trial in below[:-1]) + 1 <= 12


def test_the_same_seeds_find_the_same() -> None:
    pipe = make_pipe(FluxPipeline)
    seen: list[Trial] = []
    first, second, other = (tune(pipe, speedup=1.2, seed=seed, on_trial=seen.append) for seed in (0, 0, 100))
    assert first == second
    pictures = [trial.pictures[0].tobytes() for trial in seen if (trial.prompt, trial.threshold) == (0, 0)]
    assert pictures[0] == pictures[1] != pictures[2] and first.error != other.error


def test_a_budget_that_no_hit_keeps_gives_threshold_zero(pipe: Any) -> None:
    setting = tune(pipe, max_error=0)
    assert (setting.threshold, setting.error, setting.saved) == (0, 0, 0)
    # Every rung that is tried is given up at the first picture that differs.
    assert setting.pictures <= 3 + 3 * len(RUNGS).bit_length()


def test_a_speedup_that_nothing_reaches_is_told(pipe: Any) -> None:
    before = attributes(pipe)
    with pytest.raises(ArgumentError, match=r"speedup: found 7, needed one that a threshold up to 0.6 reaches"):
        tune(pipe, speedup=7)
    assert attributes(pipe) == before


@pytest.mark.parametrize("end", [KeyboardInterrupt, None])
def test_an_untouched_pipeline_is_left_as_it_was(pipe: Any, end: type[BaseException] | None) -> None:
    fresh = run(pipe)
    before, config = attributes(pipe), pipe._progress_bar_config
    seen: list[Trial] = []

    def stop(trial: Trial) -> None:
        seen.append(trial)
        if end and len(seen) == 5:
            raise end

    if end:
        with pytest.raises(end):
            tune(pipe, max_error=0.01, on_trial=stop)
    else:
        assert tune(pipe, max_error=0.01, on_trial=stop).pictures == len(seen)
    assert attributes(pipe) == before and pipe._progress_bar_config is config
    assert torch.equal(run(pipe), fresh)


def test_an_optimized_pipeline_keeps_its_steps_and_gets_no_cache(pipe: Any) -> None:
    fluxfire.apply_memory_format(pipe)
    fresh = run(pipe)
    before, steps = attributes(pipe), fluxfire.report(pipe).steps
    tune(pipe, speedup=1.2)
    assert attributes(pipe) == before and fluxfire.report(pipe).steps == steps
    assert torch.equal(run(pipe), fresh)


def _offloaded(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, 0)  # comes before the offload: it is the one that is tuned
    fluxfire.apply_offload(pipe, "group", device="cpu")


def _compiled(pipe: Any) -> None:
    fluxfire.apply_compile(pipe, backend="eager")


@pytest.mark.parametrize("prepare", [_compiled, _offloaded])
def test_what_is_compiled_or_offloaded_is_tuned_as_it_is(prepare: Callable[[Any], None]) -> None:
    pipe = make_pipe(FluxPipeline)
    prepare(pipe)
    fresh, names = run(pipe), [step.name for step in fluxfire.report(pipe).steps]
    setting = tune(pipe, speedup=1.2)
    assert setting.calls >= 1.2 * setting.computed
    assert [step.name for step in fluxfire.report(pipe).steps] == names and torch.equal(run(pipe), fresh)
    tune(pipe, speedup=1.2, apply=True)
    run(pipe)
    assert fluxfire.cache_stats(pipe).threshold == setting.threshold and fluxfire.cache_stats(pipe).hits


def test_an_offload_without_a_cache_below_is_told_the_order() -> None:
    pipe = make_pipe(FluxPipeline)
    fluxfire.apply_offload(pipe, "model", device="cpu")
    with pytest.raises(fluxfire.StepError, match="apply_cache, apply_offload"):
        tune(pipe, speedup=1.2)


@pytest.mark.parametrize("name", ["Flux2Pipeline", "Flux3ModularPipeline"])
def test_other_families_are_tuned(name: str) -> None:
    pipe = classes.make(name)
    case = classes.CASES[name]
    given = {key: value() for key, value in case.call.items()}
    prompts = [{"prompt_embeds": classes.text() * scale} | given for scale in (1, 0.5)]
    size = classes.SIZES[case.family]
    setting = tune(pipe, prompts, max_error=0.5, call={"height": size, "width": size, "num_inference_steps": 4})
    assert (setting.threshold, setting.steps, setting.prompts) == (max(RUNGS), 4, 2) and setting.error <= 0.5
    assert handle_of(pipe) is None


def test_a_cache_keeps_its_threshold_and_its_counts_unless_asked(pipe: Any) -> None:
    fluxfire.apply_cache(pipe, 0.35, max_consecutive_hits=1)
    fresh = run(pipe)
    before, report = attributes(pipe), fluxfire.report(pipe)
    setting = tune(pipe, speedup=1.2)
    assert dict(setting.cache)["max_consecutive_hits"] == 1  # its own settings were tuned
    assert attributes(pipe) == before and fluxfire.report(pipe) == report
    assert torch.equal(run(pipe), fresh)
    tune(pipe, speedup=1.2, apply=True)
    assert fluxfire.cache_stats(pipe).threshold == setting.threshold != 0.35


def test_asked_to_it_applies_what_it_found() -> None:
    pipe = make_pipe(FluxPipeline)
    setting = tune(pipe, speedup=1.2, apply=True)
    run(pipe)
    stats = fluxfire.cache_stats(pipe)
    assert (stats.threshold, stats.other_steps) == (setting.threshold, 0) and stats.hits > 0
    assert str(setting) in str(fluxfire.report(pipe))


def test_a_users_generator_is_not_advanced_and_decides_the_noise(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    seen: list[Trial] = []
    tune(pipe, [{"generator": generator} | prompt for prompt in PROMPTS[:1]], max_error=0, on_trial=seen.append)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(7).get_state())
    more = {"image": picture(), "max_area": 32 * 48, "_auto_resize": False}
    arguments = SIZE | PROMPTS[0] | (more if isinstance(pipe, FluxKontextPipeline) else {})
    assert pipe(**arguments, generator=generator).images[0].tobytes() == seen[0].pictures[0].tobytes()


def test_batches_count_as_their_worst_picture() -> None:
    pipe = make_pipe(FluxPipeline)
    seen: list[Trial] = []
    setting = tune(pipe, [embeds(batch=2)], max_error=0.01, on_trial=seen.append)
    assert setting.calls == 12 and all(len(trial.pictures) == 2 for trial in seen)
    for trial in seen[1:]:
        pairs = zip(seen[0].pictures, trial.pictures, strict=True)
        assert trial.error == pytest.approx(max(rms(a, b) for a, b in pairs))


def test_a_bar_is_shown_when_asked_and_in_no_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    pipe = make_pipe(FluxPipeline)
    tune(pipe, PROMPTS[:1], max_error=0)
    assert capfd.readouterr().err == ""
    setting = tune(pipe, PROMPTS[:1], max_error=0, progress=True)
    shown = capfd.readouterr().err
    assert f"{setting.pictures}/{setting.pictures}" in shown and "threshold" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "max_error=None and speedup=None, needed one"),
        ({"max_error": 0.1, "speedup": 2}, "needed one"),
        ({"max_error": -0.1}, "max_error: found -0.1"),
        ({"max_error": float("nan")}, "max_error: found nan"),
        ({"max_error": "2%"}, "max_error: found '2%'"),
        ({"speedup": 0.5}, "speedup: found 0.5, needed a number above 1"),
        ({"speedup": True}, "speedup: found True"),
        ({"max_error": 0.1, "quantile": 0}, "quantile: found 0"),
        ({"max_error": 0.1, "prompts": "a cat"}, "prompts: found one str, needed a list"),
        ({"max_error": 0.1, "prompts": []}, "prompts: found none"),
        ({"max_error": 0.1, "prompts": [3]}, "prompts: found a int at 0"),
        ({"max_error": 0.1, "call": {"output_type": "latent"}}, "output_type or return_dict at 0"),
    ],
)
def test_wrong_input_is_refused_before_a_picture_is_made(arguments: dict[str, Any], message: str) -> None:
    pipe = make_pipe(FluxPipeline)
    before = attributes(pipe)
    with pytest.raises(ArgumentError, match=message):
        fluxfire.tune(pipe, **({"prompts": PROMPTS} | arguments))
    assert attributes(pipe) == before


def test_prompts_with_different_steps_are_refused() -> None:
    prompts = [PROMPTS[0], PROMPTS[1] | {"num_inference_steps": 4}]
    with pytest.raises(ArgumentError, match="found 6 denoising steps, and 4 in prompt 1"):
        tune(make_pipe(FluxPipeline), prompts, max_error=0.1)


def test_what_is_no_flux_pipeline_is_refused() -> None:
    with pytest.raises(fluxfire.NotFluxError):
        fluxfire.tune(object(), ["a cat"], max_error=0.1)


# What a setting is, and where it holds.


@pytest.fixture
def setting() -> Setting:
    return tune(make_pipe(FluxPipeline), speedup=1.5)


def test_a_setting_survives_its_file(setting: Setting, tmp_path: Path) -> None:
    setting.save(tmp_path / "setting.json")
    assert Setting.load(tmp_path / "setting.json") == setting
    with pytest.raises(dataclasses.FrozenInstanceError):
        setting.threshold = 1  # type: ignore[misc]


@pytest.mark.parametrize("form", ["object", "path", "text"])
def test_every_threshold_takes_a_setting_or_its_path(setting: Setting, tmp_path: Path, form: str) -> None:
    path = tmp_path / "setting.json"
    setting.save(path)
    given: Any = {"object": setting, "path": path, "text": str(path)}[form]
    pipe = make_pipe(FluxPipeline)
    ways: list[Callable[[], Any]] = [
        lambda: fluxfire.apply_cache(pipe, given),
        lambda: fluxfire.optimize_pipeline(pipe, cache_threshold=given, compile=False),
        lambda: fluxfire.set_cache_threshold(fluxfire.apply_cache(pipe, 0), given),
    ]
    pictures = []
    for way in ways:
        way()
        pictures.append(run(pipe))
        stats, shown = fluxfire.cache_stats(pipe), str(fluxfire.report(pipe))
        assert stats.threshold == setting.threshold and stats.hits > 0 and str(setting) in shown
        json.dumps(fluxfire.report(pipe).as_dict())
        fluxfire.restore_pipeline(pipe)
    assert all(torch.equal(pictures[0], other) for other in pictures)


def test_another_model_is_refused_with_what_differs(setting: Setting) -> None:
    weights = make_pipe(FluxPipeline, seed=1)
    config = make_pipe(FluxPipeline, blocks=(2, 3))
    scheduler = make_pipe(FluxPipeline)
    scheduler.scheduler = type(scheduler.scheduler).from_config(scheduler.scheduler.config, shift=1.0)
    for pipe, what in ((weights, "weights"), (config, "config, weights"), (scheduler, "scheduler")):
        before = attributes(pipe)
        message = f"found on another model: {what} differ"
        with pytest.raises(ArgumentError, match=message):
            fluxfire.apply_cache(pipe, setting)
        with pytest.raises(ArgumentError, match=message):
            fluxfire.optimize_pipeline(pipe, cache_threshold=setting, compile=False)
        assert attributes(pipe) == before
        fluxfire.apply_cache(pipe, 0.1)
        with pytest.raises(ArgumentError, match=message):
            fluxfire.set_cache_threshold(pipe, setting)
        assert fluxfire.cache_stats(pipe).threshold == 0.1


def test_another_cache_is_refused(setting: Setting) -> None:
    with pytest.raises(ArgumentError, match="another cache: warmup_steps=0, here 2"):
        fluxfire.apply_cache(make_pipe(FluxPipeline), setting, warmup_steps=2)


def test_a_run_with_other_steps_is_computed_and_the_report_says_so(setting: Setting) -> None:
    plain = run(make_pipe(FluxPipeline), steps=9)
    pipe = fluxfire.apply_cache(make_pipe(FluxPipeline), setting)
    run(pipe, steps=6)
    hits = fluxfire.cache_stats(pipe).hits
    assert hits > 0 and "another number of steps" not in str(fluxfire.report(pipe))
    assert torch.equal(run(pipe, steps=9), plain)
    stats = fluxfire.cache_stats(pipe)
    assert (stats.hits, stats.other_steps) == (hits, 9)
    assert "9 denoiser calls were in runs of another number of steps" in str(fluxfire.report(pipe))
    run(pipe, steps=6)
    assert fluxfire.cache_stats(pipe).hits == 2 * hits
    fluxfire.set_cache_threshold(pipe, 0.9)  # a number again: any steps
    run(pipe, steps=9)
    assert fluxfire.cache_stats(pipe).hits > 2 * hits and fluxfire.cache_stats(pipe).other_steps == 9


def test_a_model_is_the_same_in_bfloat16_under_all_steps_and_not_after_training() -> None:
    pipe = make_pipe(FluxPipeline)
    mine = fingerprint(pipe)
    assert fingerprint(make_pipe(FluxPipeline).to(torch.bfloat16)) == mine
    fluxfire.optimize_pipeline(pipe, compile=False, fuse_qkv=True, memory_format=True)
    assert fingerprint(pipe) == mine
    with torch.no_grad():
        pipe.transformer.proj_out.weight *= 1.1
    assert mine.differs(fingerprint(pipe)) == ["weights"]


def test_weights_that_are_elsewhere_are_not_compared() -> None:
    pipe = make_pipe(FluxPipeline)
    mine = fingerprint(pipe)
    pipe.transformer.to("meta")
    assert fingerprint(pipe).weights == "" and mine.differs(fingerprint(pipe)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: [found], "found list, needed format 1"),
        (lambda found: found | {"format": 2}, "found format 2, needed format 1"),
        (lambda found: {k: v for k, v in found.items() if k != "steps"}, "steps missing or not as saved"),
        (lambda found: found | {"other": 1}, "other missing or not as saved"),
        (lambda found: found | {"threshold": -1}, "threshold missing or not as saved"),
        (lambda found: found | {"threshold": "0.1"}, "threshold missing"),
        (lambda found: found | {"steps": 2.5}, "steps missing"),
        (lambda found: found | {"calls": 0}, "calls missing"),
        (lambda found: found | {"model": {"denoiser": "x"}}, "model missing"),
        (lambda found: found | {"cache": {"batch": []}}, "cache missing"),
    ],
)
def test_a_file_of_something_else_is_refused(
    setting: Setting, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    path = tmp_path / "setting.json"
    path.write_text(json.dumps(change(setting.as_dict())))
    with pytest.raises(ArgumentError, match=message):
        fluxfire.apply_cache(make_pipe(FluxPipeline), path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("0.12")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path, message in (("absent", "No such file"), ("text", "found float, needed format"), ("bytes", "codec")):
        with pytest.raises(ArgumentError, match=message):
            Setting.load(tmp_path / path)
    with pytest.raises(ArgumentError, match=r"threshold: found '0\.12', no setting.*No such file"):
        fluxfire.apply_cache(make_pipe(FluxPipeline), "0.12")
