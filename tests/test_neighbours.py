"""Every step on pipelines as people load them and with what others put on them: exact, or refused with a reason.

The table is in `docs/neighbours.md`; `pytest tests/test_neighbours.py --write-docs` writes it anew.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import PAIR_KNOBS, run
from neighbours import NEIGHBOURS

import fluxfire
from fluxfire.optimize import RECIPES
from fluxfire.plan import ORDER

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
TABLE = Path(__file__).parent.parent / "docs" / "neighbours.md"
# static_blocks is FLUX.3's, these pipelines are FLUX.1; prompts looks at text encoders alone, and these have none.
STEPS = [name for name in ORDER if name not in ("static_blocks", "prompts")]
BIT_IDENTICAL = {"cache", "vae_tiling", "offload"}
KNOBS = PAIR_KNOBS | {"compile": {"backend": "eager"}}


def draw(pipe: Any) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # of the libraries, about themselves
        return run(pipe, steps=2, size=(32, 32), output_type="pt")


@functools.cache
def pipe_of(name: str) -> tuple[Any, torch.Tensor]:
    """The pipeline with its neighbour, and its picture; each test claims that it leaves it as it was."""
    pipe = NEIGHBOURS[name]()
    return pipe, draw(pipe)


def attributes(pipe: Any) -> dict[tuple[str, ...], int]:
    parts = {part: getattr(pipe, part) for part in ("transformer", "vae")}
    modules = {(part, path): module for part, owner in parts.items() for path, module in owner.named_modules()}
    return {(*name, key): id(value) for name, module in modules.items() for key, value in vars(module).items()}


@functools.cache
def outcome(name: str, step: str) -> str:
    pipe, baseline = pipe_of(name)
    before = attributes(pipe)
    try:
        RECIPES[step].apply(pipe, **KNOBS[step])
    except (fluxfire.StepError, fluxfire.NotFluxError) as refused:
        assert attributes(pipe) == before
        return str(refused)
    if step == "compile":
        torch._dynamo.reset()  # graphs that an earlier pipeline compiled are not counted
    out = draw(pipe)
    if step == "cache":
        fluxfire.set_cache_threshold(pipe, math.inf)
        draw(pipe)
        # diffusers calls the CPU "cpu:0", to which its hook copies the prompt in every call: another prompt, a miss.
        assert fluxfire.cache_stats(pipe).marks() == ("##" if name == "enable_model_cpu_offload" else "#.")
    if step == "compile":
        counts = fluxfire.report(pipe).compile
        assert counts is not None and (counts.graphs, counts.graph_breaks) == (1, 0)
    assert fluxfire.report(pipe).lost == ()
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(draw(pipe), baseline)
    if step in BIT_IDENTICAL:
        assert torch.equal(out, baseline)
        return "exact"
    error = ((out - baseline).norm() / baseline.norm()).item()
    if step == "quantization":
        assert 0 < error < 0.1
        return "approximate"
    assert error <= 1e-5
    return "within rounding"


@pytest.mark.parametrize(("name", "step"), list(itertools.product(NEIGHBOURS, STEPS)))
def test_a_step_beside_it_is_exact_or_refused_and_undone(name: str, step: str) -> None:
    assert outcome(name, step)


# What else was tried beside the steps, and the test that claims it: (file, test).
CLAIMS = {
    "Guidance": {
        "true CFG, also with one tensor for both branches": ("cache", "true_cfg_keeps_its_branches_apart"),
        "guiders that call two or three times a step": ("classes", "each_call_of_a_guider_is_a_branch"),
        "a guider that skips the first block": ("classes", "a_guider_that_skips_the_first_block_is_computed"),
        "a ControlNet's residuals are in a cached step once; the ControlNet itself runs in every step, before the "
        "decision, so a cached step still pays for it": ("cache", "controlnet_residuals_are_not_added_twice_on_a_hit"),
        "IP-Adapter, each sample with its own picture": ("cache", "ip_adapter_rows_follow_their_samples"),
        "a callback that replaces the prompt: a miss": ("cache", "a_callback_that_replaces_the_prompt_causes_a_miss"),
    },
    "LoRA and compiled graphs": {
        "loaded before: in the graphs; its scale is not": (
            "lora",
            "one_loaded_before_is_in_the_graphs_and_its_scale_is_not",
        ),
        "loaded after: one compilation, once": ("lora", "one_loaded_after_costs_graphs_once"),
        "`set_adapters`, `disable_lora`, `delete_adapters`: one for each new choice": (
            "lora",
            "adapters_switched_mixed_disabled_and_deleted",
        ),
        "`fuse_lora`, `unfuse_lora`": ("lora", "one_fused_into_the_weights_and_taken_out_again"),
        "swapped after `enable_lora_hotswap`: none": ("lora", "swapping_compiles_nothing"),
        "the same in each family": ("lora", "swapping_compiles_nothing_in_each_family"),
        "loaded under our group offload": ("lora", "one_loaded_under_our_group_offload"),
    },
    "Prompts remembered (`apply_prompts`)": {
        "a LoRA in a text encoder: nothing is remembered while it is there": (
            "prompts",
            "a_lora_in_an_encoder_is_never_missed",
        ),
        "a LoRA fused into a text encoder between two prompts": (
            "prompts",
            "a_lora_that_is_fused_between_two_prompts_forgets",
        ),
        "autocast, gradients, training, one's own embeddings: as without it": (
            "prompts",
            "gradients_training_and_tensors_pass_by",
        ),
    },
    "Runs": {
        "`_interrupt`": ("runs", "an_interrupted_run_makes_no_more_calls_and_leaves_nothing"),
        "Ctrl-C between steps or within one": ("runs", "a_run_after_a_keyboard_interrupt_is_fresh"),
        "Ctrl-C while compiling": ("runs", "an_interrupt_while_compiling_leaves_a_working_pipeline"),
        "`num_images_per_prompt`": ("runs", "each_of_several_pictures_of_a_prompt_decides_as_it_would_alone"),
        "other sizes and step counts": ("runs", "sizes_and_step_counts_may_change_from_run_to_run"),
        "`pipe.to`": ("runs", "moved_to_another_data_type_it_is_that_pipeline"),
        "`save_pretrained` of the whole pipeline": ("runs", "a_saved_pipeline_is_the_one_without_our_steps"),
        "`from_pipe`": ("optimize", "the_mark_is_shared_by_from_pipe"),
        "two pipelines of one class": ("cache", "two_pipelines_of_one_class_have_their_own_thresholds_and_states"),
        "two threads on one denoiser": ("others", "threads_on_one_denoiser_do_not_mix"),
        "a scheduler that calls twice a step (Heun)": ("others", "heun_calls_twice_a_step_and_is_followed"),
        "embeddings that an offload's hooks copy in every call: misses": (
            "memory",
            "embeddings_that_hooks_copy_miss_the_cache_and_are_right",
        ),
    },
    "Machines": {
        "no C++ compiler, on Linux, Windows, macOS: compile is left out": (
            "machines",
            "without_a_compiler_for_the_cpu_the_platforms_own_is_named",
        ),
        "a GPU without Triton, on Linux, Windows, ROCm: compile is left out": (
            "machines",
            "a_gpu_without_triton_is_told_what_to_install",
        ),
        "MPS, which has no float64 (not run on one)": ("machines", "the_cache_makes_no_float64"),
    },
}


def test_every_claim_of_the_docs_is_a_test() -> None:
    for file, name in (claim for claims in CLAIMS.values() for claim in claims.values()):
        tree = ast.parse((Path(__file__).parent / f"test_{file}.py").read_text())
        assert f"test_{name}" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_the_table_of_the_docs_is_what_was_found(request: pytest.FixtureRequest) -> None:
    table = _markdown()
    if request.config.getoption("--write-docs"):
        TABLE.write_text(table)
    assert TABLE.read_text() == table, "run: pytest tests/test_neighbours.py --write-docs, and read the difference"


def _markdown() -> str:
    notes: list[str] = []
    rows = []
    for name in NEIGHBOURS:
        texts = [outcome(name, step) for step in STEPS]
        notes += dict.fromkeys(
            text for text in texts if text not in ("exact", "within rounding", "approximate", *notes)
        )
        shown = [f"no [^{notes.index(text) + 1}]" if text in notes else text for text in texts]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    lines = [
        "# What works beside what",
        "",
        "Every step on FLUX.1 pipelines as people load them, and with what others put on them before; diffusers",
        f"{diffusers.__version__}, tiny random weights, float32 on a CPU. Written by `tests/test_neighbours.py`.",
        "",
        "- exact: the picture is to the bit what the pipeline gave before the step; within rounding: to a relative",
        '  error of 1e-5. Compilation has backend "eager": one graph a kind of block, no graph break.',
        "- The cache is exact where it never hits; with an infinite threshold it then hits in all steps but the first.",
        "- fused_kernels is CUDA's alone; here it runs in the operations of torch that its kernels are held against.",
        "- After `restore_pipeline` the picture is to the bit what it was, and the neighbour is still there.",
        "- bitsandbytes: diffusers loads with it on GPUs only, so its layers are put in place and quantized here.",
        "- static_blocks is FLUX.3's and these are FLUX.1. prompts looks at the text encoders alone, and these are",
        "  neighbours of the denoiser; beside the other steps it is in [pairs of steps](step-pairs.md).",
        "",
        f"| found on the pipeline | {' | '.join(STEPS)} |",
        f"|---|{'---|' * len(STEPS)}",
        *rows,
        "",
        *(f"[^{number}]: {note}" for number, note in enumerate(notes, 1)),
    ]
    for title, claims in CLAIMS.items():
        lines += ["", f"## {title}", "", "| what | shown by |", "|---|---|"]
        lines += [f"| {what} | `tests/test_{file}.py::test_{name}` |" for what, (file, name) in claims.items()]
    return "\n".join(lines) + "\n"
