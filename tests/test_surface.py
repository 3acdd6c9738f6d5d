"""The shape of the package, watched: public names, size of the core, who imports whom, what an import does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import fluxfire
from fluxfire.optimize import RECIPES
from fluxfire.plan import CONFLICTS, ORDER

CORE = Path(fluxfire.__file__).parent
FILES = sorted(path for path in CORE.glob("*.py") if path.name not in ("cli.py", "doctor.py"))  # the outer ring
PARTS = {
    "errors",
    "plan",
    "patches",
    "blocks",
    "linear",
    "run",
    "seal",
    "stats",
    "setting",
}  # what steps are made of; the rest are steps

MEGACACHE = {"aot", "artifacts", "environment", "graphs", "megacache", "share", "structure", "torch_cache"}
# The files of one step know each other.
KERNELS = {"attention_kernels", "fused_blocks", "fused_kernels", "kernels", "triton_kernels"}
MODULATION = {"modulation", "modulation_rows"}
TOGETHER = [
    KERNELS,
    MODULATION,
    {"attention", "fa4", "sage"},
    {"cache", "first_block", "forecast", "paraattn", "schedule"},
    {"compile", *MEGACACHE},
]


def imports(path: Path) -> set[str]:
    """Modules of fluxfire that a file imports, in any form, also inside functions; "" is the package itself."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    ours = {name for name in names if name.split(".")[0] in ("fluxfire", "")}
    return {name.removeprefix("fluxfire").removeprefix(".") for name in ours}


def test_public_names_are_pinned() -> None:
    assert fluxfire.__all__ == sorted(fluxfire.__all__)
    assert set(fluxfire.__all__) == {
        *(
            "ArgumentError",
            "ArtifactError",
            "CopyError",
            "FluxfireError",
            "NotFluxError",
            "NotOptimizedError",
            "StepError",
            "UndoError",
        ),
        *(
            "CacheCall",
            "CacheStats",
            "CompileStats",
            "ArtifactStats",
            "TorchCacheStats",
            "Plan",
            "Report",
            "Skip",
            "Step",
            "__version__",
        ),
        *("apply_cache", "apply_compile", "apply_memory_format", "apply_offload", "apply_vae_tiling"),
        *("check_cache", "check_compile", "check_memory_format", "check_offload", "check_vae_tiling"),
        *("apply_static_blocks", "check_static_blocks"),
        *("Fingerprint", "Setting", "Trial", "tune"),
        *("apply_fused_qkv", "check_fused_qkv", "cache_stats", "find_schedule", "set_cache_threshold"),
        *("apply_attention", "check_attention"),
        *("apply_fused_kernels", "check_fused_kernels"),
        *("apply_quantization", "check_quantization", "load_quantized", "save_quantized"),
        *("apply_prompts", "check_prompts"),
        *("apply_modulation_table", "check_modulation_table"),
        *("optimize_pipeline", "plan_pipeline", "prefetch", "report", "restore_pipeline"),
        *("load_megacache", "save_megacache", "warm"),
    }


def test_every_public_name_exists_and_is_documented() -> None:
    for name in fluxfire.__all__:
        assert name == "__version__" or getattr(fluxfire, name).__doc__, name


def test_the_core_stays_small() -> None:
    examples = re.compile(r'^\n    Examples:\n(?:        .*\n)+(?:    """\n)?', re.M)  # of docstrings, which are tests
    lines = {path.name: len(examples.sub("", path.read_text()).splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 300} == {}
    ahead = {name: count for name, count in lines.items() if name.removesuffix(".py") in MEGACACHE}
    assert sum(ahead.values()) <= 1590  # one part of its own: what replaces Dynamo's guards; torch's own artifacts
    assert sum(lines.values()) - sum(ahead.values()) <= 6880


def test_functions_stay_short() -> None:
    """40 lines of code; the docstring is apart."""
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and node.end_lineno is not None and node.end_lineno - body[0].lineno + 1 > 40:
                    long.append(f"{path.name}:{node.name}")
    assert long == []


def test_all_forms_of_import_are_seen(tmp_path: Path) -> None:
    forms = (
        "import fluxfire.compile",
        "from fluxfire import apply_cache",
        "from fluxfire.fuse import x",
        "from . import a",
    )
    for form, seen in zip(forms, ("compile", "", "fuse", ""), strict=True):
        (tmp_path / "step.py").write_text(f"def f():\n    {form}\n")
        assert imports(tmp_path / "step.py") == {seen}


def test_steps_do_not_import_each_other() -> None:
    for path in FILES:
        if path.stem not in PARTS | {"__init__", "optimize", "tuning"}:
            known = {name for name in imports(path) if name.split(".")[0] != "store"}
            mine = next((files for files in TOGETHER if path.stem in files), set())
            assert known <= PARTS | mine, path.name


def test_every_step_has_its_check_and_its_place() -> None:
    assert set(RECIPES) <= set(ORDER)
    for name, recipe in RECIPES.items():
        assert recipe.apply.__name__ == f"apply_{name}" and recipe.check.__name__ == f"check_{name}"
        assert recipe.apply.__doc__.splitlines()[0].endswith(("Lossless.", "Approximate."))
        assert recipe.apply.__doc__.splitlines()[0].endswith(f"{recipe.kind.capitalize()}.")


def test_conflicts_name_steps_in_order_and_say_what_to_do() -> None:
    for conflict in CONFLICTS:
        assert ORDER.index(conflict.first) < ORDER.index(conflict.second)
        assert ": " in conflict.reason


def test_import_asks_no_gpu_and_loads_no_pipeline() -> None:
    code = (
        "import sys, torch, fluxfire\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not any(name.startswith('diffusers') for name in sys.modules), 'diffusers was imported'\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
