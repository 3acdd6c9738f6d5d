"""A results file: `{"run": {...}, "rows": [...]}`, written anew after each row, and its tables in Markdown.

Every row has all `FIELDS`, None where there is nothing to say. JSON is strict: no nan, no infinity.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]

FIELDS: Final = {
    "workload": "what is made (workloads.py)",
    "variant": "with what (variants.py); `limit` is what the machine could do (limits.py)",
    "batch": "pictures at once",
    "steps": "denoising steps of a run",
    "what": "the calls that make the variant",
    "beside": "variant in whose own process this eager row was measured; empty for the main process",
    "pattern": "steps of the last run, # computed and . cached (forced); empty where nothing is cached",
    "ms_computed": "milliseconds of a computed step of the whole batch, median",
    "ms_computed_p10": "10th percentile",
    "ms_computed_p90": "90th percentile",
    "ms_cached": "milliseconds of a cached step of the whole batch, median",
    "s_picture": "seconds a picture: the stages' sum",
    "text_s": "text encoders, seconds a picture",
    "encode_s": "the VAE encodes the reference, seconds a picture",
    "denoise_s": "the denoising loop, seconds a picture",
    "decode_s": "the VAE decodes, seconds a picture",
    "first_call_s": "seconds of the first run of one step, compiling with empty caches included",
    "first_decode_s": "seconds of the first decoding",
    "resident_gib": "what all weights hold after the first run: denoiser, VAE, text encoders",
    "peak_gib": "most that tensors held while pictures were made",
    "rel_error": "norm of a denoiser call's difference to float32 over the norm, same weights (at reduced depth)",
    "psnr_db": "of the picture to eager's, only where weights are trained",
    "ratio_to_eager": "eager's denoise_s over this one's, both in one process",
    "ratio_to_limit": "ms_computed over the limit's",
    "joules_picture": "whole board, all stages",
    "mean_w": "its mean power",
    "pictures_wh": "pictures a watt-hour",
    "cost_picture": "at the run's price_per_hour",
    "gpu_percent": "NVML: share of time with a kernel running",
    "memory_percent": "NVML: share of time with memory in use; not a bandwidth",
    "sm_percent": "NVML GPM: multiprocessors busy",
    "tensor_percent": "NVML GPM: tensor cores busy",
    "dram_percent": "NVML GPM: of the memory's peak bandwidth",
    "dram_gb_s": "dram_percent of the peak",
    "dram_gb_s_at_least": "weights and unavoidable passes of a computed step (limits.py) over its time",
    "error": "why there is nothing else",
}


def new_row(**values: Any) -> Row:
    """A row with all fields; floats rounded to five digits, what is not finite as None.

    Raises:
        KeyError: a field that is not in `FIELDS`.
    """
    if unknown := set(values) - set(FIELDS):
        raise KeyError(f"no such fields: {', '.join(sorted(unknown))}")
    return {name: plain(values.get(name)) for name in FIELDS}


def plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


class File:
    """One results file. `put` adds a row, or replaces that of the same workload, batch, variant and process."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run
        self.rows: list[Row] = []

    def put(self, row: Row) -> None:
        """Adds a row and writes the file, whole or not at all."""
        same = [i for i, known in enumerate(self.rows) if key(known) == key(row)]
        self.rows[same[0] if same else len(self.rows) :] = [row, *(self.rows[same[0] + 1 :] if same else [])]
        text = json.dumps({"run": self.run, "rows": self.rows}, indent=1, allow_nan=False) + "\n"
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text)
        temporary.replace(self.path)


def key(row: Row) -> tuple[Any, ...]:
    """What tells a row from another of its file."""
    return row["workload"], row["batch"], row["variant"], row["beside"]


def new_path(folder: Path, name: str, gpu: str) -> Path:
    """`<name>_<gpu>_<date>.json` in the folder, with a number where there is one already."""
    stem = f"{name}_{gpu.replace(' ', '-')}_{datetime.date.today().isoformat()}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}_{number}.json"
    return path


COLUMNS: Final[tuple[tuple[str, str, str], ...]] = (  # head, field, format
    ("ms computed", "ms_computed", ".1f"),
    ("p10", "ms_computed_p10", ".1f"),
    ("p90", "ms_computed_p90", ".1f"),
    ("ms cached", "ms_cached", ".1f"),
    ("s a picture", "s_picture", ".2f"),
    ("denoise", "denoise_s", ".2f"),
    ("decode", "decode_s", ".3f"),
    ("first call s", "first_call_s", ".1f"),
    ("resident GiB", "resident_gib", ".1f"),
    ("peak GiB", "peak_gib", ".1f"),
    ("error to float32", "rel_error", ".2e"),
    ("PSNR dB", "psnr_db", ".1f"),
    ("x eager", "ratio_to_eager", ".2f"),
    ("x limit", "ratio_to_limit", ".2f"),
    ("J a picture", "joules_picture", ".0f"),
    ("pictures a Wh", "pictures_wh", ".2f"),
    ("cost a picture", "cost_picture", ".5f"),
    ("GPU %", "gpu_percent", ".0f"),
    ("SM %", "sm_percent", ".0f"),
    ("tensor %", "tensor_percent", ".0f"),
    ("DRAM GB/s", "dram_gb_s", ".0f"),
)


def cells(row: Row, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    """A row's values as text; empty where there is none."""
    return ["" if (value := row.get(field)) is None else format(value, form) for _, field, form in columns]


def used(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """The columns in which some row has a value."""
    rows = list(rows)
    return [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]


def table(rows: Sequence[Row]) -> str:
    """Rows of one workload and batch as a Markdown table; failed ones with their reason."""
    columns = used(rows)
    lines = ["| variant | " + " | ".join(head for head, _, _ in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for row in rows:
        name = f"`{row['variant']}`" + (f" (beside `{row['beside']}`)" if row.get("beside") else "")
        if row.get("error"):
            lines.append(f"| {name} | **{str(row['error']).replace('|', '/')}** |" + " |" * (len(columns) - 1))
        else:
            lines.append(f"| {name} | " + " | ".join(cells(row, columns)) + " |")
    return "\n".join(lines)


RANDOM: Final = (
    "Random weights: times and memory are real, pictures and hit rates are not. Which steps hit is forced "
    "(`half`: every other one), with each cache's own decision computed all the same."
)


def markdown(data: dict[str, Any]) -> str:
    """A results file as text for people."""
    run, parts = data["run"], []
    about = [f"{name} {run[name]}" for name in ("torch", "diffusers", "driver", "dtype") if run.get(name)]
    parts.append(f"{run['gpu']}, {', '.join(about)}, {run['date']}: `{run['command']}`")
    groups = dict.fromkeys((row["workload"], row["batch"]) for row in data["rows"] if "batch" in row)
    for workload, batch in groups:
        rows = [row for row in data["rows"] if (row["workload"], row.get("batch")) == (workload, batch)]
        parts += [f"**{workload}, batch {batch}, {rows[0].get('steps')} steps.** {run.get('note', '')}".rstrip()]
        parts += [table(rows)]
        what = [f"- `{row['variant']}`: {row['what']}" for row in rows if row.get("what") and not row.get("beside")]
        parts += ["\n".join(what)]
    return "\n\n".join(parts) + "\n"
