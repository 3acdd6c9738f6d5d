"""What a hit gets instead of the last residual: a forecast along sigma, and the correction when it comes out wrong.

A cache's error is that of holding something still which moves. Along a run it moves smoothly with sigma, the noise
level, so with the computed calls at sigma_1, sigma_2, ... (newest first) a hit at sigma gets the polynomial through the
last `order + 1` of them (Lagrange), instead of the value at sigma_1. `first_block.py` forecasts the residual `rest` so.

At the next computed call it is known where the way went in between: the polynomial through the new call and the old
ones, read at the skipped sigmas, is far nearer than the forecast was. An Euler step adds (next sigma - sigma) times the
denoiser's output, so what the picture has missed is

    owed = sum over skipped steps of (next sigma - sigma) (read back - forecast)

and the computed call's output pays it: output + owed / (next sigma - sigma). That is the corrector of a
predictor-corrector method, with no further call, as in UniPC (https://arxiv.org/abs/2302.04867). It needs a plain
Euler scheduler (`FlowMatchEulerDiscreteScheduler`, FLUX's own); with another one there is the forecast alone.

What it costs: `order` more residuals and `order + 2` outputs (which have 64 channels, not 3,072) for each guidance
branch, a pass over each in every hit; nothing crosses to the host or back where all samples of a batch agree.

How it differs from TaylorSeer (https://arxiv.org/abs/2503.06923; in diffusers and in cache-dit): that counts in steps,
which are not evenly spaced in sigma, has one history a batch, and corrects nothing afterwards.

Shapes: B samples, N noise tokens, C channels (of a residual, or of the denoiser's output).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class History:
    """The last computed values of every sample, each with its sigma, newest first.

    Args:
        length: how many are kept.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.values: list[torch.Tensor] = []  # (B, N, C) each
        self._sigmas: list[list[float]] = []  # (B,) each; nan where a sample has no such value yet

    def push(
        self, value: torch.Tensor, sigma: float, hits: tuple[bool, ...] = (), missed: torch.Tensor | None = None
    ) -> None:
        """Keeps the values (B, N, C) of a call at `sigma`; with `missed`, those of the samples that did not hit."""
        if missed is None:
            self.values = [value, *self.values][: self._length]
            self._sigmas = [[sigma] * value.shape[0], *self._sigmas][: self._length]
            return
        if len(self.values) < self._length:
            self.values.append(self.values[-1])
            self._sigmas.append([math.nan] * value.shape[0])
        newer = [value, *self.values[:-1]]
        self.values = [old.index_copy(0, missed, new[missed]) for old, new in zip(self.values, newer, strict=True)]
        for row in (row for row, hit in enumerate(hits) if not hit):
            shifted = [sigma, *(sigmas[row] for sigmas in self._sigmas[:-1])]
            for sigmas, moved in zip(self._sigmas, shifted, strict=True):
                sigmas[row] = moved

    def weights(self, row: int, sigma: float) -> list[float]:
        """Lagrange's weights of one sample's values, for the value at `sigma`."""
        return lagrange([sigmas[row] for sigmas in self._sigmas], sigma)

    def at(self, sigma: float) -> torch.Tensor:
        """The values at `sigma`, (B, N, C); where one is kept, that one, to the bit."""
        rows = [self.weights(row, sigma) for row in range(len(self._sigmas[0]))]
        return self.values[0] + self.past(rows) if len(self.values) > 1 else self.values[0]

    def past(self, rows: list[list[float]]) -> torch.Tensor | float:
        """By these weights of every sample: the sum of how far the older values are from the newest."""
        newest = self.values[0]
        total: torch.Tensor | float = 0.0
        for k, value in enumerate(self.values[1:], 1):
            total = total + _each([weights[k] for weights in rows], value - newest)
        return total


class Corrector:
    """What forecasts have cost each sample so far, and the output that makes it good.

    Args:
        length: computed outputs that are kept.
    """

    def __init__(self, length: int) -> None:
        self._history = History(length)
        self._forecast: torch.Tensor | float = 0.0  # (B, N, C) sum of (step of sigma) (output) over the skipped steps
        self._skipped: list[list[tuple[float, float]]] = []  # for every sample (sigma, step of sigma)

    @property
    def values(self) -> list[torch.Tensor]:
        """The tensors that are kept."""
        return [v for v in (*self._history.values, self._forecast) if isinstance(v, torch.Tensor)]

    def settle(
        self, output: torch.Tensor, level: tuple[float, float], hits: tuple[bool, ...], missed: torch.Tensor | None
    ) -> torch.Tensor:
        """What the scheduler shall get for an output (B, N, C), at `level`: sigma, and the step to the next one."""
        sigma, step = level
        self._skipped = self._skipped or [[] for _ in hits]
        if not all(hits):
            self._history.push(output, sigma, hits, missed)
            owing = [skipped if not hit else [] for skipped, hit in zip(self._skipped, hits, strict=True)]
            if any(owing):
                output = output + _each([bool(skipped) / step for skipped in owing], self._owed(owing))
        carried: torch.Tensor | float = 0.0
        if any(hits):
            carried = _each([step * hit for hit in hits], output)
            if isinstance(self._forecast, torch.Tensor):
                carried = _each([float(hit) for hit in hits], self._forecast) + carried
        self._forecast = carried
        for row, hit in enumerate(hits):
            self._skipped[row] = [*self._skipped[row], (sigma, step)] if hit else []
        return output

    def _owed(self, owing: list[list[tuple[float, float]]]) -> torch.Tensor:
        """What the kept outputs' polynomial gives for the skipped steps of every sample, less their forecasts."""
        rows = []
        for row, skipped in enumerate(owing):
            of_steps = [[step * w for w in self._history.weights(row, sigma)] for sigma, step in skipped]
            rows.append(
                [math.fsum(column) for column in zip(*of_steps, strict=True)] or [0.0] * len(self._history.values)
            )
        newest = self._history.values[0]
        total = _each([math.fsum(step for _, step in skipped) for skipped in owing], newest)
        return total + self._history.past(rows) - self._forecast


def lagrange(sigmas: Sequence[float], sigma: float) -> list[float]:
    """A weight for each; 0 for nan and for a sigma that is there twice."""
    known = [k for k, at in enumerate(sigmas) if not math.isnan(at) and at not in sigmas[:k]]
    others = {k: [sigmas[j] for j in known if j != k] for k in known}
    return [
        math.prod((sigma - other) / (sigmas[k] - other) for other in others[k]) if k in others else 0.0
        for k in range(len(sigmas))
    ]


def _each(factors: list[float], x: torch.Tensor) -> torch.Tensor:
    """Every sample of x (B, N, C) times its factor, which is not rounded to x's data type: as one number is not."""
    if len(set(factors)) == 1:
        return factors[0] * x
    wide = torch.promote_types(x.dtype, torch.float32)
    return (torch.tensor(factors, dtype=wide, device=x.device).view(-1, 1, 1) * x).to(x.dtype)
