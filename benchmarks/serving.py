"""What `fluxfire serve` holds out, and what it costs: floods, kills, signals, fuzzing, bombs, a soak, latency.

    python benchmarks/serving.py                          every part that a CPU can do and that is not done
    python benchmarks/serving.py --parts bombing,flood    these, anew
    python benchmarks/serving.py --small --out /tmp/try   a few of everything, to see that it works
    python benchmarks/serving.py --table                  writes the results into docs/serving.md
    python benchmarks/serving.py --parts throughput       needs a GPU, which it fills: 12 B parameters; 5 minutes

Each part starts servers of its own on 127.0.0.1, counts what it does and stops by itself; its results are written when
it ends, those of throughput after each row. Parts that only concern the server have a worker without a model
(`tests/stub_worker.py`), as their results say; all others have the embedded model. Needs the extra `dev`; the part
"fuzzing" also schemathesis, which is in no extra since nothing else needs it: `pip install schemathesis==4.32.5`.

Counts and memory hold on a busy machine; times do not. So each part notes the load, and times are told beside those of
the same run's other half (idle and generating, or the model's own share).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving_faults import kills, leaving, signals
from serving_input import bombing, fuzzing
from serving_load import flood, mixed, soak
from serving_server import FORKS, ROOT
from serving_speed import health, overhead
from serving_throughput import MEASURED, ROWS, throughput

Part = Callable[[bool], dict[str, Any]]  # takes whether only a few of everything are wanted, and gives its results
PARTS: dict[str, Part] = {
    part.__name__: part for part in (bombing, flood, mixed, overhead, health, leaving, signals, fuzzing, soak, kills)
}
TABLES = {"cpu": "measured", "throughput": "throughput"}  # a kind of results, and the mark in docs/serving.md


def main() -> None:
    """Runs parts, keeps results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="", help=f"of {', '.join(PARTS)}, throughput; comma-separated")
    parser.add_argument("--models", default="", help=f"of throughput: of {', '.join(ROWS)}; comma-separated")
    parser.add_argument("--small", action="store_true", help="a few of everything")
    parser.add_argument("--table", action="store_true", help="write the newest results into docs/serving.md")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.table:
        return write_tables(options.out)
    parts, models = _named(parser, options.parts, (*PARTS, "throughput")), _named(parser, options.models, tuple(ROWS))
    options.out.mkdir(parents=True, exist_ok=True)
    FORKS.set_forkserver_preload(["fluxfire.serve.server", "fluxfire.serve.pictures", "bombs"])
    file = newest(options.out, "cpu") or options.out / f"serving_cpu_{datetime.date.today()}.json"
    for name in parts or [name for name in PARTS if name not in _read(file)["parts"]]:
        if name == "throughput":
            rows_of_throughput(models or (("tiny_half", "tiny") if options.small else MEASURED), options.out)
            continue
        begin, load = time.monotonic(), os.getloadavg()[0]
        result = PARTS[name](options.small)
        about = {"date": datetime.date.today().isoformat(), "seconds": round(time.monotonic() - begin, 1)}
        about |= {"load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)], "small": options.small}
        results = _read(file)
        results["parts"][name] = result | about
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: {key: value for key, value in result.items() if key not in ("each", "samples")}}))


def _named(parser: argparse.ArgumentParser, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name for name in given.split(",") if name)
    if unknown := set(names) - set(known):
        parser.error(f"found {', '.join(sorted(unknown))}, needed some of {', '.join(known)}")
    return names


def _read(file: Path) -> dict[str, Any]:
    """The results so far."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "parts": {}}
    return found


def rows_of_throughput(names: tuple[str, ...], folder: Path) -> None:
    """Measures them, keeps them in a file of their own, and prints them."""
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    for row in throughput(names):
        rows.append(row)
        about = machine()
        name = (about["gpu"] or "cpu").lower().replace(" ", "-")
        file = folder / f"serving_throughput_{name}_{datetime.date.today()}.json"
        seconds = round(time.monotonic() - begin, 1)
        file.write_text(json.dumps({"machine": about, "seconds": seconds, "rows": rows}, indent=1) + "\n")
        print("\n".join(_throughput_table([row])[0 if len(rows) == 1 else 2 :]), flush=True)


def newest(folder: Path, kind: str) -> Path | None:
    """The last results there are."""
    return max(folder.glob(f"serving_{kind}_*.json"), default=None, key=lambda file: file.stem.rsplit("_", 1)[1])


def machine() -> dict[str, Any]:
    """Where this ran."""
    import torch

    about = {"system": platform.platform(terse=True), "cores": os.cpu_count(), "python": platform.python_version()}
    return about | {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_tables(folder: Path) -> None:
    """The results as tables in docs/serving.md."""
    page = ROOT / "docs" / "serving.md"
    text = page.read_text()
    for kind, mark in TABLES.items():
        if file := newest(folder, kind):
            results = json.loads(file.read_text())
            lines = [f"From `benchmarks/results/{file.name}`, made by `python benchmarks/serving.py`; do not edit.", ""]
            lines += _parts_table(results["parts"]) if kind == "cpu" else _throughput_table(results["rows"])
            begin, end = text.index(f"<!-- {mark} -->"), text.index(f"<!-- /{mark} -->")
            text = text[:begin] + f"<!-- {mark} -->\n\n" + "\n".join(lines) + "\n\n" + text[end:]
    page.write_text(text)


def _parts_table(parts: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| part | what | found | load of the machine |", "|---|---|---|---|"]
    for name, part in PARTS.items():
        if found := parts.get(name):
            about = {"date", "seconds", "load_before_and_after", "small", "each", "samples"}
            facts = (f"{key.replace('_', ' ')} {_cell(value)}" for key, value in found.items() if key not in about)
            load = " to ".join(map(str, found["load_before_and_after"]))
            lines.append(f"| {name} | {part.__doc__} | {'; '.join(facts)} | {load} |")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number}" for key, number in value.items())
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _throughput_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line a row; seconds are the median of a batch's."""
    stages = ("prepare", "denoise", "decode", "encode")
    head = ("served", "batch", "pictures a minute", "steps computed", *(f"{stage}, s" for stage in stages), "GiB")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        steps = f"{row['computed_steps']} of {row['computed_steps'] + row['cached_steps']}"
        seconds = (row["stages_s_a_batch"][stage] for stage in stages)
        cells = (row["model"], row["batch"], row["pictures_a_minute"], steps, *seconds, row["gpu_used_gib"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main()
