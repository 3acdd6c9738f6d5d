"""A cache threshold with what it was found on: the model, the number of denoising steps, the cache's other settings.

A threshold means something only where it was found. Distances between denoising steps depend on the weights, on the
scheduler and on how far apart the steps are, so a `Setting` carries a fingerprint of these and refuses other ones:

- another model, scheduler, or other settings of the cache: an error when it is applied, nothing was changed;
- a run with another number of steps: computed without hits, and the report says so. The pictures are right then, only
  slow; an error would come in the middle of somebody's work, and a hit would be a guess.

The fingerprint is cheap: the denoiser's and the scheduler's configuration, and `SAMPLES` values of every parameter,
rounded to bfloat16, so that a model loaded in float32 and in bfloat16 is the same. A LoRA, quantized weights, a
fine-tuned copy are other models. Weights that an offload keeps elsewhere (on the meta device) are not compared.

The file is JSON: numbers and names, nothing that runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from fluxfire.blocks import denoiser_of
from fluxfire.errors import ArgumentError

FORMAT: Final = 1
SAMPLES: Final = 4  # values of each parameter: FLUX.1 has 780 parameters, so a changed layer is seen


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells one model from another: digests, "" for weights that could not be read.

    Examples:
        >>> one = fluxfire.Fingerprint("FluxTransformer2DModel", "a1", "b1", "c1")
        >>> one.differs(fluxfire.Fingerprint("FluxTransformer2DModel", "a1", "b2", "c1"))
        ['weights']
    """

    denoiser: str
    config: str
    weights: str
    scheduler: str

    def differs(self, found: Fingerprint) -> list[str]:
        """The parts in which `found` is another model."""
        pairs = ((name, getattr(self, name), getattr(found, name)) for name in ("denoiser", *_PARTS))
        return [name for name, mine, theirs in pairs if mine and theirs and mine != theirs]


_PARTS: Final = ("config", "weights", "scheduler")


@dataclass(frozen=True, slots=True, repr=False)
class Setting:
    """What `tune` found; `cache_threshold=` and `threshold=` take it, or the path of its file.

    `error` holds for the share `quantile` of the prompts, `worst_error` for all; both are root mean square differences
    of pictures, 1 from black to white. `calls` of the denoiser were made for the prompts' pictures, of which `computed`
    were computed. `pictures` were made to find it. Of `max_error` and `speedup` one was asked, the other is None.

    Examples:
        >>> setting = fluxfire.tune(pipe, [prompt | {"output_type": "pil"}], max_error=0.5)
        >>> fluxfire.apply_cache(pipe, setting) is pipe
        True
    """

    threshold: float
    steps: int
    model: Fingerprint
    cache: tuple[tuple[str, Any], ...]  # the cache's other settings
    max_error: float | None
    speedup: float | None
    quantile: float
    error: float
    worst_error: float
    calls: int
    computed: int
    prompts: int
    pictures: int

    @property
    def saved(self) -> float:
        """The share of denoiser calls that hit, 0 to 1."""
        return 1 - self.computed / self.calls

    def __str__(self) -> str:
        error = f"error {self.error:.2%} or less in {self.quantile:.0%} of {self.prompts} prompts"
        return f"threshold {self.threshold:g} at {self.steps} steps: {error}, {self.saved:.0%} of the calls saved"

    def __repr__(self) -> str:
        return f"<{self}>"

    def as_dict(self) -> dict[str, Any]:
        """The setting as values that JSON knows, as they are in the file."""
        return {"format": FORMAT} | asdict(self) | {"cache": dict(self.cache)}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the setting as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Setting:
        """Reads what `save` wrote.

        Raises:
            ArgumentError: no such file, or it is none of a setting.
        """
        no = f"threshold: found {str(path)!r}, no setting that fluxfire.tune has found"
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{no}: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            what = f"format {found.get('format')!r}" if isinstance(found, dict) else type(found).__name__
            raise ArgumentError(f"{no}: found {what}, needed format {FORMAT}: tune anew")
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ (found.keys() - {"format"})) or [n for n in names if not _plausible(n, found[n])]:
            raise ArgumentError(f"{no}: {', '.join(sorted(wrong))} missing or not as saved: tune anew")
        model = Fingerprint(**found["model"])
        return cls(**{n: found[n] for n in names} | {"model": model, "cache": tuple(found["cache"].items())})

    def check(self, pipe: Any, knobs: dict[str, Any]) -> None:
        """Whether this pipeline, with these other settings of the cache, is what the setting was found on.

        Raises:
            ArgumentError: it is not, and in what.
        """
        here = fingerprint(pipe)
        other = dict(self.cache)
        again = "call fluxfire.tune(pipe, prompts, ...) on this one, or pass a number as threshold"
        if different := self.model.differs(here):
            names = f"{self.model.denoiser}, here {here.denoiser}"
            raise ArgumentError(
                f"this setting was found on another model: {', '.join(different)} differ (found on {names}): {again}"
            )
        if different := sorted(name for name in other.keys() | knobs if other.get(name) != knobs.get(name)):
            found = ", ".join(f"{name}={other.get(name)!r}, here {knobs.get(name)!r}" for name in different)
            raise ArgumentError(f"this setting was found with another cache: {found}: {again}")


Threshold: TypeAlias = float | Setting | str | PathLike[str]


def threshold_of(threshold: Threshold) -> tuple[float, Setting | None]:
    """The number, and the setting that it comes from, if any.

    Raises:
        ArgumentError: not a number of 0 or more, nor a setting, nor the path of one.
    """
    if isinstance(threshold, str | PathLike):
        threshold = Setting.load(threshold)
    if isinstance(threshold, Setting):
        return threshold.threshold, threshold
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not threshold >= 0:  # nan is not >= 0
        raise ArgumentError(
            f"threshold: found {threshold!r}, needed a number of 0 (never hits) or more, such as 0.12, "
            "or what fluxfire.tune found, or the path of its file"
        )
    return threshold, None


def fingerprint(pipe: Any) -> Fingerprint:
    """What tells this pipeline's model from another.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.
    """
    denoiser = denoiser_of(pipe)
    scheduler = _digest([type(pipe.scheduler).__name__, _config(pipe.scheduler)])
    return Fingerprint(type(denoiser).__name__, _digest(_config(denoiser)), _weights(denoiser), scheduler)


def _config(part: Any) -> dict[str, Any]:
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


@torch.no_grad()
def _weights(denoiser: torch.nn.Module) -> str:
    """A digest of every parameter's name, kind, shape, and `SAMPLES` values of it."""
    named: list[Any] = []
    values: list[torch.Tensor] = []
    for name, parameter in sorted(denoiser.named_parameters()):
        data = parameter.data
        if data.is_meta:
            return ""
        plain = type(data) is torch.Tensor
        named.append([name, list(data.shape), "" if plain else type(data).__name__])
        if plain and data.numel():
            flat = data.reshape(-1)
            some = flat[:: max(len(flat) // SAMPLES, 1)][:SAMPLES]
            values.append(some.to("cpu", torch.bfloat16))  # one by one: an offload has them on several devices
    return _digest([named, torch.cat(values).view(torch.int16).tolist()])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plausible(name: str, value: Any) -> bool:
    """Whether a value read from a file can be this field's."""
    if name == "model":
        parts = {"denoiser", *_PARTS}
        return isinstance(value, dict) and value.keys() == parts and all(isinstance(v, str) for v in value.values())
    if name == "cache":
        return isinstance(value, dict) and all(v is None or isinstance(v, int | float | str) for v in value.values())
    if value is None:
        return name in ("max_error", "speedup")
    whole = name in ("steps", "calls", "computed", "prompts", "pictures")
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= (name in ("steps", "calls"))
