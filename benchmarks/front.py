"""Quality against denoiser calls saved, on the embedded model: fluxfire, its peers, and fewer steps.

    python benchmarks/front.py --work ~/front        # goes on where it stopped; then writes table and plot

Held-out prompts and edits (names of `fluxfire.demo.prompts` never trained on), float32, one thread. Pictures are
compared before they are rounded to bytes, with those of the same pipeline without a cache. Each method is tuned over
its own knobs on other pictures than those that count: of what saves a target's share of calls, the settings with the
highest PSNR are run on the pictures that count. Calls are counted where they happen: at the last block's attention.

Needs the extras `bench`, `demo` and `para-attn`, and for the references of edits `training/README.md`'s pictures (npm).
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from front_methods import METHODS, Method, Settings, calibrate_magcache

import fluxfire
from fluxfire import demo

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `training`

Kind = Literal["t2i", "edit"]
KINDS: Final[tuple[Kind, ...]] = ("t2i", "edit")
TARGETS: Final = (0.5, 0.64)  # share of calls saved; of 28 and 50 steps, 10 and 18 computed calls save 64 %
TUNE: Final = 8  # pictures of each kind to tune on, the last of the 200 held-out names
SHARD: Final = 10  # pictures of a line of the results, and of a call where the method takes batches


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
def inputs(kind: Kind, shard: int) -> Inputs:
    """The held-out pictures of a shard; those to tune on are shard -1."""
    pipe, cases = loaded(), demo.prompts("edit")
    chosen = cases[-TUNE:] if shard < 0 else cases[:-TUNE][shard * SHARD : (shard + 1) * SHARD]
    prompts = [c.prompt if kind == "edit" else f"{c.name.replace('-', ' ')}, {c.style} style" for c in chosen]
    embeds, pooled, _ = pipe.encode_prompt(prompts, max_sequence_length=24)
    references = None
    if kind == "edit":
        from training import data

        index = {name: i for i, name in enumerate(data.names())}
        drawn = [data.load()[data.STYLES.index(str(c.source)), index[c.name]] for c in chosen]
        pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = pipe.vae.encode(pictures).latent_dist.mode()
        references = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return Inputs(embeds, pooled, references, [c.seed + (1000 if kind == "t2i" else 0) for c in chosen])


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
        self.scores = False  # whether the report has SSIM, FLIP and SSIMULACRA2, some minutes of work
        (folder / "latents").mkdir(parents=True, exist_ok=True)
        self.points: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("points-*.jsonl")):
            self.points |= {point["key"]: point for point in map(json.loads, path.read_text().splitlines())}

    @functools.cache  # noqa: B019
    def pictures(self, key: str) -> np.ndarray:
        """Of a baseline."""
        return decode(np.load(self.folder / "latents" / f"{key}.npy"))

    def baseline(self, point: dict[str, Any]) -> np.ndarray:
        """The uncached pictures of a point's shard."""
        return self.pictures(_spec("baseline", {}, point["kind"], point["steps"], point["shard"])[1])

    def shards(self, method: Method, settings: Settings, kind: Kind, steps: int) -> list[dict[str, Any]]:
        """The points that count of these settings, as far as they were made."""
        keys = [_spec(method.name, settings, kind, steps, shard)[1] for shard in range(1000)]
        return [self.points[key] for key in keys if key in self.points]

    def kept(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Numbers that take long, from a file of this name."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
        numbers: dict[str, float] = json.loads(path.read_text())
        return numbers

    def make(self, method: Method | None, settings: Settings, kind: Kind, steps: int, shard: int) -> dict[str, Any]:
        """Makes a shard's pictures, unless there are, and writes its line; None for the method: the baseline."""
        name = method.name if method else "baseline"
        spec, key = _spec(name, settings, kind, steps, shard)
        if known := self.points.get(key):
            return known
        baseline = None if method is None else self.pictures(self.make(None, {}, kind, steps, shard)["key"])
        start = time.process_time()
        latents, saved = self._run(method, settings, kind, steps, shard)
        np.save(self.folder / "latents" / f"{key}.npy", latents)
        point = spec | {"key": key, "saved": saved}
        if baseline is not None:
            squares = ((decode(latents) - baseline).astype(np.float64) ** 2).mean((1, 2, 3))
            point["psnr"] = [round(float(-10 * np.log10(max(value, 1e-12))), 4) for value in squares]
        point["cpu_s"] = round(time.process_time() - start, 1)
        with (self.folder / f"points-{name.replace(' ', '-')}.jsonl").open("a") as file:
            file.write(json.dumps(point) + "\n")
        self.points[key] = point
        told = "" if method is None else f"{np.mean(saved):.1%} saved, {np.mean(point['psnr']):.2f} dB"
        print(f"{name} {settings} {kind} {steps} shard {shard}: {told} in {point['cpu_s']} s", flush=True)
        return point

    def _run(
        self, method: Method | None, settings: Settings, kind: Kind, steps: int, shard: int
    ) -> tuple[np.ndarray, list[float]]:
        """The latents of every picture, and the share of its calls that were saved."""
        pipe, given = fresh(), inputs(kind, shard)
        if method and method.name == "diffusers MagCache":
            settings = settings | {"mag_ratios": self._mag_ratios(kind, steps)}
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
        if method and method.name.startswith("cache-dit"):
            import cache_dit

            cache_dit.disable_cache(pipe)
        return np.concatenate(made), saved

    def _mag_ratios(self, kind: Kind, steps: int) -> list[float]:
        path = self.folder / f"mag-{kind}-{steps}.json"
        if not path.exists():
            pipe = fresh()
            run = lambda: pipe(num_inference_steps=steps, **inputs(kind, -1).call(slice(None)))  # noqa: E731
            path.write_text(json.dumps(calibrate_magcache(pipe, steps, run)))
        ratios: list[float] = json.loads(path.read_text())
        return ratios


def _spec(name: str, settings: Settings, kind: Kind, steps: int, shard: int) -> tuple[dict[str, Any], str]:
    """What a point is, and its key."""
    spec = {"method": name, "settings": settings, "kind": kind, "steps": steps, "shard": shard}
    return spec, hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def chosen(work: Work, method: Method, kind: Kind, steps: int, make: bool = True) -> list[Settings]:
    """For each target, the best of what saves that much on the tuning pictures, or one call less; else the nearest.

    We get no call less than the target. Without `make`, of what was tried already.
    """
    grid = method.grid(steps)
    if not make:
        grid = [s for s in grid if _spec(method.name, s, kind, steps, -1)[1] in work.points]
    tried = [work.make(method, settings, kind, steps, -1) for settings in grid]
    picked: list[Settings] = []
    for target in TARGETS if tried else ():
        least = target - 1e-3 - (0 if method.ours else 1 / steps)
        enough = [p for p in tried if np.mean(p["saved"]) >= least]
        best = (
            max(enough, key=lambda p: np.mean(p["psnr"])) if enough else max(tried, key=lambda p: np.mean(p["saved"]))
        )
        picked.append(best["settings"])
    return picked


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of what is made, outside of the repository")
    parser.add_argument("--shards", type=int, default=10, help=f"of {SHARD} pictures of each kind that count")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--report", action="store_true", help="make nothing, write table and plot of what there is")
    parser.add_argument("--scores", action="store_true", help="with SSIM, FLIP and SSIMULACRA2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(options.work)
    work.scores = options.scores
    for steps in [] if options.report else options.steps:
        found = {(name, kind): chosen(work, METHODS[name], kind, steps) for name in options.methods for kind in KINDS}
        for shard in range(options.shards):
            for (name, kind), settings in found.items():
                for one in settings:
                    work.make(METHODS[name], one, kind, steps, shard)
    import front_report

    front_report.write(work, options.steps)


if __name__ == "__main__":
    main()
