"""`fluxfire bench` on the embedded model and tiny ones: counts, patterns and the schema, never times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import embeds, make_pipe
from diffusers import FluxPipeline

import fluxfire
from fluxfire import cli
from fluxfire.bench import limits, measure, peers, results, runner, variants, workloads
from fluxfire.bench.measure import Bench, Settings

TINY = {"steps": 5, "repeats": 2, "device": "cpu", "dtype": "float32"}


def bench(out: Path, *arguments: object) -> list[dict[str, Any]]:
    """The command; the data of its results files."""
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "--out", str(out), "--device", "cpu", *map(str, arguments)])
    assert exit.value.code == 0
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def measured(variant: variants.Variant, workload: str = "tiny-t2i", **settings: Any) -> results.Row:
    of = Settings(**(TINY | {"workload": workload, "batch": 1, "variants": (), "errors": False} | settings))
    measuring = Bench(of, lambda text: None)
    measuring.prepare(lambda row: None)
    return measuring.measure(variant, lambda row: None)


def test_the_command_measures_the_embedded_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = "only:cache,diffusers-fbc-half"
    arguments = ("--steps", 4, "--repeats", 1, "--variants", names, "--price-per-hour", 2)
    edit, text = bench(tmp_path, "--workload", "embedded-t2i,embedded-edit", *arguments)
    assert {row["workload"] for row in text["rows"]} == {"embedded-t2i"}
    for data in (edit, text):
        assert set(data["run"]) >= {"gpu", "torch", "diffusers", "driver", "command", "date"}
        assert all(tuple(row) == tuple(results.FIELDS) for row in data["rows"])
        limit, eager, cache, fbc = data["rows"]
        assert [row["variant"] for row in data["rows"]] == ["limit", "eager", *names.split(",")]
        assert (cache["pattern"], eager["pattern"]) == ("#.#.", "")
        assert limit["ms_computed"] > limit["ms_cached"] > 0
        for row in (eager, cache):
            stages = [row[name] or 0 for name in ("text_s", "encode_s", "denoise_s", "decode_s")]
            assert (row["encode_s"] is None) is (data is text)
            assert row["s_picture"] == pytest.approx(sum(stages), rel=1e-3)
            assert row["cost_picture"] == pytest.approx(row["s_picture"] * 2 / 3600, rel=1e-3)
            assert row["ratio_to_eager"] == pytest.approx(eager["denoise_s"] / row["denoise_s"], rel=1e-3)
            assert row["ratio_to_limit"] == pytest.approx(row["ms_computed"] / limit["ms_computed"], rel=1e-3)
            assert row["rel_error"] < 1e-5 and row["joules_picture"] is None
        assert 10 < cache["psnr_db"] < 80
        # diffusers' cache, forced the same way, gives the same picture.
        assert (fbc["pattern"], fbc["error"]) == ("#.#.", None)
        assert fbc["psnr_db"] == pytest.approx(cache["psnr_db"], abs=0.1)
    stdout, stderr = capfd.readouterr()
    files = json.loads(stdout)["files"]
    assert sorted(Path(file).suffix for file in files) == [".json", ".json", ".log", ".md", ".md"]
    assert "embedded-edit b1 diffusers-fbc-half: ms_computed" in stderr


def test_a_child_that_takes_too_long_is_a_row_beside_its_own_eager(tmp_path: Path) -> None:
    path = tmp_path / "bench.log"
    settings = Settings("tiny-t2i", 1, ("eager", "original-half"), errors=False, **TINY)
    with runner.output_to(path):
        (file,) = runner.bench(
            [settings], tmp_path, "command", say=lambda text: None, advance=lambda row: None, child_limit_s=0.1
        )
    limit, eager, last = file.rows
    assert [row["variant"] for row in file.rows] == ["limit", "eager", "original-half"]
    assert [row["beside"] for row in file.rows] == ["", "original-half", ""]
    assert limit["ms_computed"] > 0 and eager["ms_computed"] > 0
    assert last["error"] == "did not finish within 0.1 s" and last["first_call_s"] == 0.1
    assert all(tuple(row) == tuple(results.FIELDS) for row in file.rows)


def test_a_child_that_dies_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_CHILD", "raise SystemExit(3)")
    settings = Settings("tiny-t2i", 1, ("eager", "torchao-fp8"), beside="torchao-fp8", **TINY)
    (row,) = runner.in_child(settings, 60)
    assert (row["error"], row["beside"]) == ("its process ended with code 3", "")


def test_every_row_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    counts: list[int] = []

    def look(text: str) -> None:
        counts.extend(len(json.loads(path.read_text())["rows"]) for path in tmp_path.glob("*.json"))

    settings = Settings("tiny-t2i", 2, ("eager", "only:fused_qkv", "only:cache"), errors=False, **TINY)
    (file,) = runner.bench([settings], tmp_path, "command", say=look, advance=lambda row: None)
    assert sorted(set(counts)) == [1, 2, 3] and len(file.rows) == 4
    assert all(row["batch"] == 2 for row in file.rows)


def test_past_the_time_limit_variants_are_rows_that_say_so(tmp_path: Path) -> None:
    settings = Settings("tiny-t2i", 1, ("eager", "original-half"), errors=False, **TINY)
    (file,) = runner.bench(
        [settings], tmp_path, "command", say=lambda text: None, advance=lambda row: None, time_limit_s=0
    )
    assert [row["error"] for row in file.rows] == ["not begun: the time limit was reached"]


def test_what_fails_before_the_variants_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings = Settings("tiny-t2i", 1, ("eager", "only:fused_qkv"), errors=False, **TINY)
    rows: list[results.Row] = []
    run = partial(measure.run, settings, rows.append, say=lambda text: None, done=lambda row: None, late=lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(limits, "measure", fail)
        run()
    whys = {row["variant"]: row["error"] for row in rows}
    assert whys == {"limit": "OutOfMemoryError: CUDA out of memory", "eager": None, "only:fused_qkv": None}
    rows.clear()
    monkeypatch.setattr(workloads, "build_text_encoders", fail)
    run()
    whys = {row["variant"]: row["error"] for row in rows}
    assert whys == {"limit": None} | dict.fromkeys(settings.variants, "OutOfMemoryError: CUDA out of memory")


@pytest.mark.parametrize("name", ["diffusers-fbc-half", "only:cache"])
def test_every_other_step_hits_in_every_run(name: str) -> None:
    variant = variants.VARIANTS[name]
    pipe = make_pipe()
    marks = variant.apply(pipe, 5)
    for steps in (1, 5, 4):
        pipe(**embeds(), height=32, width=32, num_inference_steps=steps, output_type="latent")
        assert marks() == "#.#.#"[:steps]


def test_a_failing_variant_leaves_the_next_one_alone() -> None:
    def fail(pipe: Any, steps: int) -> Any:
        raise RuntimeError("first line\nsecond line")

    failed = measured(variants.Variant("peer", fail, "peer.enable(pipe)"))
    assert (failed["error"], failed["what"], failed["ms_computed"]) == (
        "RuntimeError: first line",
        "peer.enable(pipe)",
        None,
    )
    assert measured(variants.VARIANTS["eager"])["error"] is None


def test_ablations_apply_what_their_names_say() -> None:
    def steps(name: str) -> dict[str, dict[str, Any]]:
        pipe = make_pipe()
        variants.VARIANTS[name].apply(pipe, 5)  # nothing is compiled before the first call
        return {step.name: dict(step.settings) for step in fluxfire.report(pipe).steps}

    whole, vae = steps("stack"), steps("stack+vae")
    assert (list(whole), list(vae)) == (["fused_qkv", "compile"], ["memory_format", "fused_qkv", "compile"])
    assert (whole["compile"]["mode"], whole["compile"]["vae"]) == ("max-autotune-no-cudagraphs", False)
    flags = {"epilogue_fusion", "coordinate_descent_tuning", "coordinate_descent_check_all_directions"}
    assert set(dict(whole["compile"]["options"])) == flags
    assert vae["compile"]["vae"] and set(dict(vae["compile"]["options"])) == flags | {"conv_1x1_as_mm"}
    assert list(steps("without:fused_qkv")) == ["compile"]
    assert steps("without:max-autotune-no-cudagraphs")["compile"]["mode"] == "default"
    assert "epilogue_fusion" not in dict(steps("without:epilogue_fusion=False")["compile"]["options"])
    alone = steps("only:compile+shape_padding=False")
    assert list(alone) == ["compile"] and alone["compile"]["options"] == (("shape_padding", False),)


def test_cuda_graphs_are_measured_on_the_whole_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxfire.fused_kernels.ON_CPU", True)
    for kind, first in (("lossless", []), ("float8", ["quantization"])):
        pipe = make_pipe()
        variants.VARIANTS[f"{kind}-all+kernels+reduce-overhead"].apply(pipe, 5)
        steps = {step.name: dict(step.settings) for step in fluxfire.report(pipe).steps}
        assert list(steps) == [*first, "fused_qkv", "fused_kernels", "compile", "modulation_table"]
        assert steps["compile"]["mode"] == "reduce-overhead"


def test_attention_in_8_bits_is_measured_where_one_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxfire.fused_kernels.ON_CPU", True)
    names = [name for name in variants.VARIANTS if "attention8" in name]
    assert sorted(names) == [
        *(
            f"float8-all+attention8{more}"
            for more in ("", "+reduce-overhead", "+reduce-overhead-half", "-half", "-schedule")
        ),
        "lossless-all+attention8",
    ]
    assert set(names) <= set(variants.GROUPS["speed-more"]) and not set(names) & set(variants.GROUPS["default"])
    for name in names:
        pipe = make_pipe()
        variants.VARIANTS[name].apply(pipe, 5)
        steps = {step.name: step for step in fluxfire.report(pipe).steps}
        cached = ["cache"] if variants.VARIANTS[name].what.count("cache") else []
        first = ["quantization"] if name.startswith("float8") else []
        assert list(steps) == [*first, "fused_qkv", "fused_kernels", "compile", *cached, "modulation_table"]
        assert steps["fused_kernels"].kind == "approximate"
        assert "attention" in dict(steps["fused_kernels"].settings)["parts"]


def test_what_compilers_print_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with runner.output_to(tmp_path / "log") as stderr:
        os.write(1, b"to stdout\n")  # print goes past file descriptor 1 where pytest captures
        subprocess.run([sys.executable, "-c", "import sys; print('from a child', file=sys.stderr)"], check=True)
        os.write(stderr, b"progress\n")
    print("after")
    assert capfd.readouterr() == ("after\n", "progress\n")
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "from a child", "to stdout"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "sdxl"), "workload: found 'sdxl', needed some of t2i-1024"),
        (("--variants", "eager,teacache"), "variants: found 'teacache'"),
        (("--batch", "1,x"), "batch: found '1,x'"),
        (("--batch", "0"), "batch: found '0'"),
    ],
)
def test_the_command_refuses_in_words(tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"fluxfire: {message}"):
        cli.main(["bench", "--out", str(tmp_path), "--device", "cpu", *arguments])


def test_the_command_lists_its_names(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--list"])
    shown = capfd.readouterr().out
    assert all(name in shown for name in (*workloads.WORKLOADS, *variants.VARIANTS, *variants.GROUPS))


def test_the_recipes_repair_walks_all_blocks_as_diffusers_does() -> None:
    """Against the pipeline's own loop, at para-attn's threshold 0."""
    utils = pytest.importorskip("para_attn.first_block_cache.utils")
    pipe = make_pipe(FluxPipeline)
    arguments = embeds() | {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    latents = {"latents": torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))}
    before = pipe(**arguments, **latents).images
    blocks = utils.CachedTransformerBlocks(
        pipe.transformer.transformer_blocks,
        pipe.transformer.single_transformer_blocks,
        transformer=pipe.transformer,
        return_hidden_states_first=False,
    )
    blocks.call_remaining_transformer_blocks = peers._remaining_blocks.__get__(blocks)
    pipe.transformer.transformer_blocks = torch.nn.ModuleList([blocks])
    pipe.transformer.single_transformer_blocks = torch.nn.ModuleList()
    with utils.cache_context(utils.create_cache_context(residual_diff_threshold=0.0)):
        assert torch.equal(pipe(**arguments, **latents).images, before)
