"""Quality against denoiser calls saved, on the embedded model: fluxfire, its peers, and fewer steps.

    python benchmarks/front.py --work ~/front --workers 8   # goes on where it stopped, then writes the report

Held-out prompts and edits (names of `fluxfire.demo.prompts` never trained on), float32, one thread a process. Pictures
are compared before they are rounded to bytes, with those of the same pipeline without a cache. Each method is tuned
over its own knobs on other pictures than those that count: of what saves a target's share of calls, the settings with
the highest PSNR are run on the pictures that count. Calls are counted where they happen: at the last block's attention.

Needs the extras `bench`, `demo`, `quality` and `para-attn`, and for the references of edits `training/README.md`'s
pictures (npm), which are then kept in the folder.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from front_methods import ARTICLE, METHODS, Method, Settings, calibrate_magcache

import fluxfire
from fluxfire import demo
from fluxfire.bench import quality

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `training`

Kind = Literal["t2i", "edit"]
KINDS: Final[tuple[Kind, ...]] = ("t2i", "edit")
TARGETS: Final = (0.5, 0.64)  # share of calls saved; of 28 and 50 steps, 10 and 18 computed calls save 64 %
TUNE: Final = 8  # pictures of each kind to tune on, the last of the 200 held-out names
SHARD: Final = 10  # pictures of a line of the results, and of a call where the method takes batches
SCORES: Final = ("ssim", "ms_ssim", "flip", "ssimulacra2")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the pipeline is given for some pictures of one kind."""

    embeds: torch.Tensor  # (n, tokens, width)
    pooled: torch.Tensor  # (n, width)
    references: torch.Tensor | None  # (n, channels, h, w) latents
    seeds: list[int]

    def call(self, rows: slice, seed: int = 0) -> dict[str, Any]:
        """Arguments of one call; `seed` is added to every picture's own."""
        image = {} if self.references is None else {"image": self.references[rows]}
        generator = [torch.Generator().manual_seed(own + seed) for own in self.seeds[rows]]
        text = {"prompt_embeds": self.embeds[rows], "pooled_prompt_embeds": self.pooled[rows]}
        return demo.call_kwargs() | image | text | {"generator": generator, "output_type": "latent"}


@functools.cache
def loaded() -> Any:
    """The pipeline that stays as it was loaded."""
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fresh() -> Any:
    """A pipeline with a denoiser and a scheduler of its own, to be changed."""
    parts = dict(loaded().components)
    parts |= {name: copy.deepcopy(parts[name]) for name in ("transformer", "scheduler")}
    pipe = type(loaded())(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
@torch.no_grad()
def inputs(folder: Path, kind: Kind, shard: int) -> Inputs:
    """The held-out pictures of a shard; those to tune on are shard -1."""
    pipe, cases = loaded(), demo.prompts("edit")
    chosen = cases[-TUNE:] if shard < 0 else cases[:-TUNE][shard * SHARD : (shard + 1) * SHARD]
    prompts = [c.prompt if kind == "edit" else f"{c.name.replace('-', ' ')}, {c.style} style" for c in chosen]
    embeds, pooled, _ = pipe.encode_prompt(prompts, max_sequence_length=24)
    references = None
    if kind == "edit":
        drawn = kept(folder / "references.npy", _references)[[cases.index(c) for c in chosen]]

        def encode() -> np.ndarray:
            pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = pipe.vae.encode(pictures).latent_dist.mode()
            encoded: np.ndarray = ((latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor).numpy()
            return encoded

        references = torch.from_numpy(kept(folder / f"references-{shard}.npy", encode))
    return Inputs(embeds, pooled, references, [c.seed + (1000 if kind == "t2i" else 0) for c in chosen])


def _references() -> np.ndarray:
    """The pictures (200, h, w, 3) of all edits, uint8."""
    from training import data

    index = {name: i for i, name in enumerate(data.names())}
    return np.stack([data.load()[data.STYLES.index(str(c.source)), index[c.name]] for c in demo.prompts("edit")])


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that takes long, from this file."""
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, make())
        partial.replace(path)
    array: np.ndarray = np.load(path)
    return array


@torch.no_grad()
def decode(latents: np.ndarray) -> np.ndarray:
    """Packed latents (n, tokens, channels) as pictures (n, h, w, 3), floats of 0 to 1."""
    pipe = loaded()
    unpacked = pipe._unpack_latents(torch.from_numpy(latents), demo.SIZE, demo.SIZE, pipe.vae_scale_factor)
    unpacked = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pictures: np.ndarray = (pipe.vae.decode(unpacked).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return pictures


class Work:
    """The folder of what was made: `points-*.jsonl`, a line a shard of a method's pictures, and latents by its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("latents", "pictures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.points: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("points-*.jsonl")):
            self.points |= {point["key"]: point for point in map(json.loads, path.read_text().splitlines())}

    def latents(self, key: str) -> np.ndarray:
        """Of a point."""
        found: np.ndarray = np.load(self.folder / "latents" / f"{key}.npy")
        return found

    def baseline(self, kind: Kind, steps: int, shard: int) -> np.ndarray:
        """The uncached pictures (n, h, w, 3) of a shard, floats of 0 to 1."""
        key = Job("baseline", {}, kind, steps, shard).key
        return kept(self.folder / "pictures" / f"{key}.npy", lambda: decode(self.latents(key)))

    def shards(self, method: Method, settings: Settings, kind: Kind, steps: int) -> list[dict[str, Any]]:
        """The points that count of these settings, as far as they were made."""
        keys = [Job(method.name, settings, kind, steps, shard).key for shard in range(200 // SHARD)]
        return [self.points[key] for key in keys if key in self.points]

    def made(self, job: Job) -> bool:
        """Whether it was."""
        if job.method == "baseline":
            return (self.folder / "latents" / f"{job.key}.npy").exists()
        return job.key in self.points

    def add(self, point: dict[str, Any]) -> None:
        """Writes a point's line."""
        with (self.folder / f"points-{point['method'].replace(' ', '-')}.jsonl").open("a") as file:
            file.write(json.dumps(point) + "\n")
        self.points[point["key"]] = point

    def make(self, job: Job) -> dict[str, Any] | None:
        """Makes a shard's pictures and keeps them; gives its point, None for a baseline."""
        start = time.process_time()
        if job.method == "baseline":
            kept(self.folder / "latents" / f"{job.key}.npy", lambda: self._run(job)[0])
            self.baseline(job.kind, job.steps, job.shard)
            return None
        baseline = self.baseline(job.kind, job.steps, job.shard)
        if job.method == "JPEG":
            pictures = np.stack([quality.jpeg(picture, job.settings["quality"]) for picture in baseline])
            pictures, saved = (pictures / 255).astype(np.float32), []
        else:
            latents, saved = self._run(job)
            np.save(self.folder / "latents" / f"{job.key}.npy", latents)
            pictures = decode(latents)
        squares = ((pictures - baseline).astype(np.float64) ** 2).mean((1, 2, 3))
        point = job.spec | {"key": job.key, "saved": saved}
        point["psnr"] = [round(float(-10 * np.log10(max(value, 1e-12))), 4) for value in squares]
        if job.shard >= 0:
            for name in SCORES:
                values = [quality.METRICS[name].measure(a, b) for a, b in zip(baseline, pictures, strict=True)]
                point[name] = round(float(np.mean(values)), 6)
        return point | {"cpu_s": round(time.process_time() - start, 1)}

    def _run(self, job: Job) -> tuple[np.ndarray, list[float]]:
        """The latents of every picture, and the share of its calls that were saved."""
        method, settings, steps = METHODS.get(job.method), job.settings, job.steps
        pipe, given = fresh(), inputs(self.folder, job.kind, job.shard)
        if job.method == "diffusers MagCache":
            settings = settings | {"mag_ratios": self._mag_ratios(job.kind, steps)}
        if method:
            method.apply(pipe, settings, steps)
        calls = [0]
        last = pipe.transformer.single_transformer_blocks[-1].attn
        last.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        width = len(given.seeds) if method is None or method.splits else 1
        made, saved = [], []
        for start in range(0, len(given.seeds), width):
            call = given.call(slice(start, start + width), settings.get("seed", 0))
            calls[0] = 0
            made.append(pipe(num_inference_steps=settings.get("steps", steps), **call).images.float().numpy())
            share = [1 - calls[0] / steps] * len(made[-1])
            if method and method.ours:
                run = fluxfire.cache_stats(pipe).last_run
                share = [sum(c.hits[row] for c in run) / steps for row in range(len(made[-1]))]
            saved += [round(value, 4) for value in share]
        if job.method.startswith("cache-dit"):
            import cache_dit

            cache_dit.disable_cache(pipe)
        return np.concatenate(made), saved

    def _mag_ratios(self, kind: Kind, steps: int) -> list[float]:
        path = self.folder / f"mag-{kind}-{steps}.json"
        if not path.exists():
            pipe, given = fresh(), inputs(self.folder, kind, -1)
            run = lambda: pipe(num_inference_steps=steps, **given.call(slice(None)))  # noqa: E731
            text = json.dumps(calibrate_magcache(pipe, steps, run))
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(text)
            partial.replace(path)
        ratios: list[float] = json.loads(path.read_text())
        return ratios


@dataclass(frozen=True, slots=True)
class Job:
    """A shard of a method's pictures."""

    method: str  # of `METHODS`, or "baseline"
    settings: Settings
    kind: Kind
    steps: int
    shard: int

    @property
    def spec(self) -> dict[str, Any]:
        """What a point is."""
        names = ("method", "settings", "kind", "steps", "shard")
        return {name: getattr(self, name) for name in names}

    @property
    def key(self) -> str:
        """Of its point and files."""
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:16]


def _tried(work: Work, method: Method, kind: Kind, steps: int) -> list[dict[str, Any]]:
    keys = [Job(method.name, settings, kind, steps, -1).key for settings in method.grid(steps)]
    return [work.points[key] for key in keys if key in work.points]


def chosen(work: Work, method: Method, kind: Kind, steps: int) -> list[Settings]:
    """For each target, the best of what saves that much on the tuning pictures, or one call less; else the nearest.

    We get no call less than the target. Of what was tried already.
    """
    if method.follows:
        return [
            {"marks": s["schedule"], "steps_computation_policy": "static", "taylorseer_order": s["extrapolate"]}
            for s in chosen(work, METHODS["fluxfire"], kind, steps)
        ]
    tried = _tried(work, method, kind, steps)
    picked: list[Settings] = []
    for target in TARGETS if tried else ():
        least = target - 1e-3 - (0 if method.ours else 1 / steps)
        enough = [p for p in tried if np.mean(p["saved"]) >= least]
        best = (
            max(enough, key=lambda p: np.mean(p["psnr"])) if enough else max(tried, key=lambda p: np.mean(p["saved"]))
        )
        picked.append(best["settings"])
    return picked


def fewest(work: Work, kind: Kind, steps: int) -> Settings | None:
    """Our settings with the fewest calls that on the tuning pictures are as near as para-attn at 0.12."""
    aim = work.points.get(Job("para-attn", ARTICLE, kind, steps, -1).key)
    near = [
        p for p in _tried(work, METHODS["fluxfire"], kind, steps) if aim and np.mean(p["psnr"]) >= np.mean(aim["psnr"])
    ]
    best = max(near, key=lambda p: (np.mean(p["saved"]), np.mean(p["psnr"])), default=None)
    return best and best["settings"]


def _ready(work: Work, options: argparse.Namespace, failed: set[str]) -> Iterator[Job]:
    """What can be made now and was not, the most important first."""
    before = 0
    for shards in options.shards:
        for late, steps in itertools.product((False, True), options.steps):
            methods = [METHODS[name] for name in options.methods if METHODS[name].late is late]
            jobs: list[Job] = []
            counted: list[tuple[str, Kind, Settings]] = []
            for method, kind in itertools.product(methods, KINDS):
                tuned = METHODS["fluxfire"] if method.follows else method
                tuning = [Job(tuned.name, settings, kind, steps, -1) for settings in tuned.grid(steps)]
                jobs += tuning
                if all(work.made(job) or job.key in failed for job in tuning):
                    some = [*chosen(work, method, kind, steps), *method.always]
                    some += [fewest(work, kind, steps)] if method.name == "fluxfire" else []
                    counted += [(method.name, kind, s) for i, s in enumerate(some) if s and s not in some[:i]]
            for shard in range(before, shards):
                jobs += [Job(name, settings, kind, steps, shard) for name, kind, settings in counted]
            bases = {(job.kind, job.shard): Job("baseline", {}, job.kind, steps, job.shard) for job in jobs}
            yield from (job for job in bases.values() if not work.made(job))
            yield from (job for job in jobs if not work.made(job) and work.made(bases[job.kind, job.shard]))
        before = shards


def _work(folder: Path, job: Job) -> tuple[Job, dict[str, Any] | str | None]:
    """In a process of its own: the point, or what went wrong."""
    try:
        return job, Work(folder).make(job)
    except Exception:  # one method's failure shall not end the others
        return job, traceback.format_exc()


def produce(work: Work, options: argparse.Namespace) -> None:
    """Makes what is missing, in processes, until the time is over."""
    until = time.monotonic() + options.time_limit
    loaded()  # before the processes are forked, so that they have it
    finished: queue.SimpleQueue[tuple[Job, dict[str, Any] | str | None]] = queue.SimpleQueue()
    flying: set[str] = set()
    failed: set[str] = set()
    waiting: list[Job] = []
    with multiprocessing.get_context("fork").Pool(options.workers, torch.set_num_threads, (1,)) as pool:
        while time.monotonic() < until:
            if not waiting:
                ready = {j.key: j for j in _ready(work, options, failed) if j.key not in flying | failed}
                waiting = list(ready.values())[: options.workers]
            if not waiting and not flying:
                break
            while waiting and len(flying) < options.workers + 2:
                flying.add(waiting[0].key)
                pool.apply_async(
                    _work, (work.folder, waiting.pop(0)), callback=finished.put, error_callback=finished.put
                )
            try:
                job, result = finished.get(timeout=min(5, max(0.1, until - time.monotonic())))
            except queue.Empty:
                continue
            flying.remove(job.key)
            told = f"{job.method} {job.settings} {job.kind} {job.steps} shard {job.shard}"
            if isinstance(result, str):
                failed.add(job.key)
                print(f"FAILED {told}\n{result}", flush=True)
            elif result:
                work.add(result)
                saved, psnr = np.mean(result["saved"] or [0]), np.mean(result["psnr"])
                print(f"{told}: {saved:.1%} saved, {psnr:.2f} dB in {result['cpu_s']} s", flush=True)
            else:
                print(told, flush=True)


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of what is made, outside of the repository")
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[10, 20],
        help=f"of {SHARD} pictures of each kind that count: first so many for every number of steps, then so many",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument(
        "--report", action=argparse.BooleanOptionalAction, help="nothing but tables and plots, or no such"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(options.work)
    if not options.report:
        produce(work, options)
    if options.report is not False:
        import front_report

        front_report.write(work, options.steps)


if __name__ == "__main__":
    main()
