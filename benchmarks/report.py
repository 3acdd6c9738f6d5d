"""docs/benchmarks.md, its plot and figures in other pages, from the results of `fluxfire bench`.

    python benchmarks/report.py            # after new results; needs matplotlib (fluxfire[bench])

In README.md and docs, `134.9<!--t2i-1024 fluxfire ms_computed .1f-->` is a figure of a row: workload, variant, field,
format. It is written anew from the newest such row of FIGURE_OF, batch 1, 28 steps.

Rows of one workload, batch and number of steps on one kind of GPU come together in one table, whichever run they are
of, the newest of each variant; each row's ratio to eager is of its own process, that to the limit of the fastest limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from fluxfire.bench import results
from fluxfire.bench.workloads import GUIDANCE

ROOT: Final = Path(__file__).parent.parent
PLOT: Final = "assets/benchmarks.png"
FULL: Final = {"t2i-1024": "Text to image, 1024x1024", "kontext-1024": "Kontext edit, 1024x1024"}
OTHER_SIZES: Final = {"t2i-512": "Text to image, 512x512", "t2i-2048": "Text to image, 2048x2048"}
TITLES: Final = FULL | OTHER_SIZES

FIGURE: Final = re.compile(r"[0-9.]+%?<!--(\S+) (\S+) (\S+) (\S+)-->")
FIGURE_OF: Final = "NVIDIA H100 80GB HBM3"

Group = list[tuple[dict[str, Any], results.Row]]  # the run and the row

SPEED: Final = (
    ("ms a computed step", "ms_computed", ".1f"),
    ("p10", "ms_computed_p10", ".1f"),
    ("p90", "ms_computed_p90", ".1f"),
    ("ms a cached step", "ms_cached", ".1f"),
    ("s a picture", "s_picture", ".2f"),
    ("x eager", "ratio_to_eager", ".2f"),
    ("x limit", "ratio_to_limit", ".2f"),
    ("first call s", "first_call_s", ".1f"),
    ("resident GiB", "resident_gib", ".1f"),
    ("peak GiB", "peak_gib", ".1f"),
    ("error to float32", "rel_error", ".2e"),
)
BUSY: Final = (
    ("text s", "text_s", ".3f"),
    ("encode s", "encode_s", ".3f"),
    ("denoise s", "denoise_s", ".2f"),
    ("decode s", "decode_s", ".3f"),
    ("W", "mean_w", ".0f"),
    ("J a picture", "joules_picture", ".0f"),
    ("pictures a Wh", "pictures_wh", ".2f"),
    ("cost a picture", "cost_picture", ".5f"),
    ("GPU %", "gpu_percent", ".0f"),
    ("SM %", "sm_percent", ".0f"),
    ("tensor %", "tensor_percent", ".0f"),
    ("DRAM GB/s", "dram_gb_s", ".0f"),
)
INTRO: Final = f"""# Benchmarks

Made by `python benchmarks/report.py` from [benchmarks/results](../benchmarks/results); do not edit.

> **{results.RANDOM}** What the cache hits and what that costs in pictures is measured on the embedded model:
> [embedded-model.md](embedded-model.md), [log.md](log.md).

![Seconds a picture by stage, for each variant](assets/benchmarks.png)

## What the columns say

Each row is a new pipeline with empty compiler caches: FLUX.1's transformer (12 B), VAE, CLIP-L and T5-XXL at full size.
After a first call and a warm-up run, whole pictures are made stage by stage, from the same inputs in all rows.

- *ms a computed / cached step*: of the whole batch, median over all steps but each run's first, by events on the GPU;
  p10 and p90 beside it. *s a picture*: all stages, divided by the batch.
- *x eager*: eager diffusers' denoising time over this row's, both measured in one process. *x limit*: a computed step
  over what this GPU could do: the step's matrix products and attention at the fastest rates of all runs here, plus the
  bytes that must move between them at the measured copy rate (`src/fluxfire/bench/limits.py` counts them).
- *first call s*: the first run of one step, compilation included. *resident* and *peak GiB*: what tensors hold.
- *error to float32*: norm of the difference of one denoiser call over the norm, at reduced depth (2 double and 4 single
  blocks of full width), so that the float32 model fits beside. Eager bfloat16 has one too: compare with that.
- *J a picture*: the whole board, by the driver's counter. *GPU %*: time with any kernel running; *SM %*, *tensor %* and
  *DRAM GB/s*: NVML's performance counters. *cost a picture*: at the price an hour that stands with the run.
"""
OURS: Final = ("#e4572e", "#4c78a8")
CLAIMS: Final = {
    "channels_last": "part of the 1.5 x",
    "fused_qkv": "part of the 1.5 x",
    "compile": "part of the 1.5 x",
    "cache": "2 x",
}
ABLATION: Final = """## Ablation

Each step and compiler flag alone, and left out of the stack of all, as far as measured. The article
[Run FLUX.1-dev three times faster](https://modal.com/blog/flux-3x-faster), from which the stack is, sums up: 1.5 x from
compilation, channels_last and fused projections together, 2 x from the first-block cache. *x eager* is to eager in the
row's own process; the eager row shown is one of several.
"""


def load(folder: Path) -> Group:
    """All rows of `fluxfire bench` in a folder with their runs; other files of results are left alone."""
    found: Group = []
    for path in sorted(folder.glob("*.json"), key=_by_number):
        data = json.loads(path.read_text())
        found += [(data["run"], row) for row in data.get("rows", ()) if {"variant", "what", "beside"} <= set(row)]
    return found


def _by_number(path: Path) -> tuple[str, int]:
    """So that a day's tenth file comes after its second: `new_path` names them `..._2026-11-28_10`."""
    name, _, number = path.stem.rpartition("_")
    return (name, int(number)) if number.isdigit() else (path.stem, 0)


def is_peer(row: results.Row) -> bool:
    """Whether another library made it."""
    return str(row["variant"]).startswith(("diffusers", "cache-dit", "torchao", "original"))


def is_ablation(row: results.Row) -> bool:
    """Whether a variant is of one step or flag."""
    return str(row["variant"]).startswith(("only:", "without:", "stack"))


def groups(found: Group) -> dict[tuple[Any, ...], list[results.Row]]:
    """Rows that belong into one table: same GPU, workload, batch and steps. One row a variant: the newest.

    `again` has the speed-up of each of its runs.

    A run without errors leaves those of an older row, which are of the same calls.

    Of limits the fastest, which all rows are compared with; eager rows of other processes only where there is none of a
    main process.
    """
    tables: dict[tuple[Any, ...], dict[str, results.Row]] = {}
    for run, row in found:
        if row["workload"] in TITLES:
            rows = tables.setdefault((run["gpu"], row["workload"], row["batch"], row["steps"]), {})
            before = rows.get(row["variant"], {})
            slower = row["variant"] == "limit" and before and row["ms_computed"] >= before["ms_computed"]
            if not before or not (slower or row["beside"]):
                marks = {"host": bound_by_host(row), "guidance": run.get("guidance", 3.5)}
                encoded = row["encode_s"] if row["workload"].startswith("kontext") else None
                error = before.get("rel_error") if row["rel_error"] is None else row["rel_error"]
                again = [*before.get("again", ()), row["ratio_to_eager"]]
                rows[row["variant"]] = row | marks | {"encode_s": encoded, "rel_error": error, "again": again}
    for rows in tables.values():
        for name, row in rows.items():
            if "limit" in rows and name != "limit" and row["ms_computed"]:
                row["ratio_to_limit"] = row["ms_computed"] / rows["limit"]["ms_computed"]
    order = list(TITLES)
    ordered = sorted(tables.items(), key=lambda item: (item[0][0], order.index(item[0][1]), *item[0][2:]))
    return {name: list(rows.values()) for name, rows in ordered}


def bound_by_host(row: results.Row) -> bool:
    """Whether the GPU waited for the host in a row where nothing else makes it wait."""
    return row["gpu_percent"] is not None and row["gpu_percent"] < 85 and not row["pattern"]


def table(rows: Iterable[results.Row], columns: Iterable[tuple[str, str, str]]) -> str:
    """Measured rows; without the columns that nobody has a value in."""
    measured = [row for row in rows if row["ms_computed"] is not None]
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in measured)]
    lines = ["| | " + " | ".join(head for head, _, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in measured:
        name = f"`{row['variant']}`" + " (host)" * row["host"]
        lines.append(f"| {name} | " + " | ".join(results.cells(row, columns)) + " |")
    return "\n".join(lines)


def failed(rows: Iterable[results.Row]) -> list[str]:
    """Variants without figures, and why."""
    return [f"- `{row['variant']}` has no figures: {row['error']}" for row in rows if row["error"]]


def section(name: tuple[Any, ...], rows: list[results.Row]) -> list[str]:
    """One workload: speed, then stages and energy."""
    gpu, workload, batch, steps = name
    where = "" if gpu == FIGURE_OF else f", {gpu}"
    parts = [f"## {TITLES[workload]}, batch {batch}{where}\n\n{gpu}, {steps} steps."]
    parts.append(table(rows, SPEED))
    parts += [f"The limit: {row['what']}." for row in rows if row["variant"] == "limit" and row["what"]]
    parts.append(table([row for row in rows if row["variant"] != "limit"], BUSY))
    again = {row["variant"]: row["again"] for row in rows if None not in row["again"] and row["variant"] != "eager"}
    told = [f"`{name}` {', '.join(f'{x:.2f}' for x in ratios)}" for name, ratios in again.items() if len(ratios) > 1]
    if told:
        parts.append(f"Those that ran more than once, x eager in each run, the oldest first: {'; '.join(told)}.")
    if any(row["host"] for row in rows):
        parts.append("(host): the GPU waited for the host, whose speed varies on a shared machine; see *GPU %*.")
    if any(row["rel_error"] and row["guidance"] != GUIDANCE for row in rows):
        parts.append("Errors near 4 % are of guidance 3.5: bfloat16 rounds 1000 times that to 3504, in every variant.")
    what = [f"- `{row['variant']}`: {row['what']}" for row in rows if row["variant"] != "limit" and not row["error"]]
    return [*parts, "\n".join([*what, *failed(rows)])]


def whole(rows: list[results.Row]) -> list[results.Row]:
    """Those that are no ablation's; none where only its limit and eager are left."""
    kept = [row for row in rows if not is_ablation(row)]
    return kept if any(row["variant"] not in ("limit", "eager") for row in kept) else []


def ablation(tables: dict[tuple[Any, ...], list[results.Row]]) -> list[str]:
    """The rows of single steps and flags, beside what was claimed for them."""
    parts = []
    for (gpu, workload, batch, steps), rows in tables.items():
        if any(is_ablation(row) for row in rows):
            lines = [f"{gpu}, {TITLES[workload]}, batch {batch}, {steps} steps.", ""]
            rows = [row for row in rows if is_ablation(row) or row["variant"] == "eager"]
            columns = [column for column in SPEED if column[1] not in ("rel_error", "ratio_to_limit")]
            columns += [("decode s", "decode_s", ".3f"), ("first decode s", "first_decode_s", ".1f")]
            of = table(rows, columns).split("\n")
            claims = [CLAIMS.get(str(row["variant"]).split(":")[-1], "") for row in rows if row["ms_computed"]]
            ends = [" article's claim |", "---|", *(f" {claim} |" for claim in claims)]
            lines += [line + end for line, end in zip(of, ends, strict=True)]
            parts += ["\n".join([*lines, "", *failed(rows)]).rstrip()]
    return [ABLATION.rstrip(), *parts] if parts else []


def document(folder: Path) -> str:
    """docs/benchmarks.md."""
    found = load(folder)
    tables = groups(found)
    parts = [INTRO.rstrip()]
    for name, rows in tables.items():
        if rows := whole(rows):
            parts += section(name, rows)
    parts += ablation(tables)
    runs = {json.dumps(run): run for run, row in found if row["workload"] in TITLES}
    lines = ["## Runs", ""]
    for run in runs.values():
        about = (
            f"{run['gpu']}, driver {run['driver']}, torch {run['torch']}, diffusers {run['diffusers']}, {run['date']}"
        )
        price = f", {run['price_per_hour']:g} an hour" if run.get("price_per_hour") else ""
        remark = f" {run['remark']}" if run.get("remark") else ""  # written by hand into a results file
        lines.append(f"- {about}{price}: `{run['command']}`{remark}")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def filled(text: str, tables: dict[tuple[Any, ...], list[results.Row]]) -> str:
    """A page with its figures as the results have them.

    Raises:
        KeyError: no such row.
    """

    def figure(match: re.Match[str]) -> str:
        workload, variant, field, form = match.groups()
        rows = {row["variant"]: row for row in tables[FIGURE_OF, workload, 1, 28]}
        return f"{rows[variant][field]:{form}}<!--{workload} {variant} {field} {form}-->"

    return FIGURE.sub(figure, text)


def pages() -> list[Path]:
    """Those in which figures may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def draw(folder: Path, path: Path) -> None:
    """Seconds a picture of 28 steps by stage, a panel for each workload and GPU; a line where the limit is."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tables = {name: kept for name, rows in groups(load(folder)).items() if (kept := whole(rows))}
    tables = {name: rows for name, rows in tables.items() if name[2:] == (1, 28)}
    drawn = {name: [row for row in rows if row["s_picture"]] for name, rows in tables.items()}
    heights = [len(rows) for rows in drawn.values()]
    size = (8, 1.1 + 0.36 * sum(heights) + 0.75 * len(heights))
    figure, axes = pyplot.subplots(
        len(drawn), figsize=size, squeeze=False, gridspec_kw={"height_ratios": heights}, layout="constrained"
    )
    stages = {"text_s": "#9aa5b1", "encode_s": "#e0c060", "denoise_s": "", "decode_s": "#5b6770"}
    for (axis,), ((gpu, workload, batch, steps), rows) in zip(axes, drawn.items(), strict=True):
        names = [str(row["variant"]) + " (host)" * row["host"] for row in rows]
        left = [0.0] * len(rows)
        for stage, colour in stages.items():
            colours = ["#b0b0b0" if row["variant"] == "eager" else OURS[is_peer(row)] for row in rows]
            values = [row[stage] or 0.0 for row in rows]
            axis.barh(names, values, left=left, color=colour or colours, height=0.7)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for y, (row, end) in enumerate(zip(rows, left, strict=True)):
            label = f"{end:.2f} s, {row['ratio_to_eager']:.2f} x" if row["ratio_to_eager"] else f"{end:.2f} s"
            axis.text(end, y, f" {label}", va="center", fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 1})
        limit = next(
            (row["ms_computed"] for row in tables[gpu, workload, batch, steps] if row["variant"] == "limit"), None
        )
        if limit:
            axis.axvline(limit * steps / batch / 1e3, color="black", linestyle=":", linewidth=1)
        axis.set_xlim(0, max(left) * 1.18)
        axis.invert_yaxis()
        axis.set_title(f"{TITLES[workload]}, batch {batch}, {steps} steps, {gpu}", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    note = "fluxfire (red), others (blue); seconds a picture: "
    note += "text encoders (light grey), reference's encoding (yellow), denoising, decoding (dark)\n"
    note += "x: denoising against eager's; dotted: the machine's limit, no step cached\n"
    figure.supxlabel(note + "random weights: hits are forced, every other step in “half”", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Writes all of it."""
    folder = ROOT / "benchmarks" / "results"
    (ROOT / "docs" / "benchmarks.md").write_text(document(folder))
    tables = groups(load(folder))
    for page in pages():
        page.write_text(filled(page.read_text(), tables))
    draw(folder, ROOT / "docs" / PLOT)


if __name__ == "__main__":
    main()
