"""Runs the bench over workloads and batch sizes: this process's variants, then those that need one of their own.

A variant that leaves something in the process (inductor's global flags, a patched pipeline class) runs in a child,
after an eager row of that child's, so that its ratio is of one process. A child that does not finish its variant in
time is ended, and the time that it had is its figure.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from fluxfire.bench.energy import open_nvml
from fluxfire.bench.measure import Say, Settings, failed, run
from fluxfire.bench.results import FIELDS, RANDOM, File, Row, new_path
from fluxfire.bench.variants import VARIANTS
from fluxfire.bench.workloads import DEPTH, GUIDANCE, WORKLOADS

_CHILD: Final = "from fluxfire.bench.runner import child; child()"
_START_S: Final = 600.0  # most seconds in which a child imports, measures the limit and its eager row


def environment(settings: Settings, command: str) -> dict[str, Any]:
    """The `run` of a results file."""
    device = torch.device(settings.device)
    nvml, without = open_nvml(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    note = RANDOM if WORKLOADS[settings.workload].model != "embedded" else ""
    if settings.errors and note:
        note += f" Errors are of one denoiser call with {DEPTH[0]} double and {DEPTH[1]} single blocks of full width."
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "driver": nvml.driver() if nvml else None,
        "command": command,
        "date": date.today().isoformat(),
        "dtype": settings.dtype,
        "repeats": settings.repeats,
        "guidance": GUIDANCE,
        "price_per_hour": settings.price_per_hour,
        "energy": without or "NVML",
        "note": note,
    }


def bench(
    all_settings: Sequence[Settings],
    out: Path,
    command: str,
    say: Say,
    advance: Callable[[Row], None],
    *,
    child_limit_s: float = 480.0,
    time_limit_s: float | None = None,
) -> list[File]:
    """Runs everything, a results file for each workload; `advance` is called once for each finished variant.

    Args:
        all_settings: one for each workload and batch size.
        out: folder of the results.
        command: what was typed.
        say: told what is under way.
        advance: given every finished row.
        child_limit_s: seconds that a variant in its own process may take after its eager row.
        time_limit_s: no variant begins after this many seconds; it gets a row that says so.
    """
    begin = time.monotonic()
    late: Callable[[], bool] = lambda: time_limit_s is not None and time.monotonic() - begin > time_limit_s  # noqa: E731
    files: dict[str, File] = {}
    for settings in all_settings:
        name = settings.workload
        if name not in files:
            gpu = environment(settings, command)
            files[name] = File(new_path(out, name, gpu["gpu"]), gpu)
        put = files[name].put
        own = tuple(name for name in settings.variants if not VARIANTS[name].isolated)
        apart = [name for name in settings.variants if VARIANTS[name].isolated]
        alone = own == ("eager",) and bool(apart)  # every child measures eager and the limit itself
        if not alone:
            run(replace(settings, variants=own), put, say=say, done=advance, late=late)
        for variant in apart:
            if late():
                put(failed(settings, variant, "not begun: the time limit was reached"))
            else:
                say(f"{variant}, in a process of its own")
                beside = replace(settings, variants=("eager", variant), beside=variant)
                for row in in_child(beside, child_limit_s):
                    if row["variant"] != "limit" or alone:
                        put(row)
                    if row["variant"] == "eager" and alone and variant == apart[0]:
                        advance(row)
            advance(files[name].rows[-1])
    return list(files.values())


def in_child(settings: Settings, limit_s: float) -> list[Row]:
    """Runs `settings` in a new process. Its rows: limit and eager as far as it came, and its variant's in any case."""
    variant = settings.variants[-1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(asdict(settings)), str(path)], start_new_session=True
        )
        rows: list[Row] = []
        began, deadline = None, time.monotonic() + _START_S
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                rows = _read(path)
                if began is None and any(row["variant"] == "eager" and row["done"] for row in rows):
                    began = time.monotonic()
                    deadline = began + limit_s
        finally:
            late = process.poll() is None
            if late:
                os.killpg(process.pid, signal.SIGKILL)  # compilation's own processes too
            process.wait()
        rows = _read(path)
    newest = {row["variant"]: {name: row[name] for name in FIELDS} for row in rows}  # a row comes again with its error
    if variant not in newest:
        why = f"its process ended with code {process.returncode}"
        if late:
            what = "did not finish" if began else "its process did not come to it"
            why = f"{what} within {limit_s if began else _START_S:g} s"
        newest[variant] = failed(settings, variant, why) | {"first_call_s": limit_s if late and began else None}
    return [row | {"beside": variant if row["variant"] == "eager" else ""} for row in newest.values()]


def _read(path: Path) -> list[Row]:
    """Whole lines only."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def child() -> None:
    """The other process: settings and a file's name come as arguments, rows go into the file."""
    settings = Settings(**json.loads(sys.argv[1]))
    with Path(sys.argv[2]).open("a") as file:

        def write(row: Row, done: bool) -> None:
            file.write(json.dumps(row | {"done": done}) + "\n")
            file.flush()

        run(
            settings,
            lambda row: write(row, False),
            say=lambda text: None,
            done=lambda row: write(row, True),
            late=lambda: False,
        )


@contextmanager
def output_to(path: Path) -> Iterator[int]:
    """What compilers print (autotuning prints tables), children's output too, goes to a file.

    Yields:
        A file descriptor of the real stderr, for progress.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield saved[1]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.close(log)
