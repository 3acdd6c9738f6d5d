"""What `modulation.py` puts in the place of modulation layers and embedders, and the tables from which they take rows.

Shapes: S steps, B samples, D channels, C numbers that a block takes (12 D for a double, 3 D for a single block).
"""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from fluxfire.blocks import family_of, tensors_in
from fluxfire.errors import StepError
from fluxfire.plan import Handle
from fluxfire.run import Call, RunReader, Seen, at_last_step, same, seen
from fluxfire.seal import Seal

_MOVERS: Final = {"_hf_hook", "_diffusers_hook"}  # accelerate's and diffusers' hooks, by their attributes
EMBEDDERS: Final = ("time_text_embed", "context_embedder", "pos_embed")  # of the denoiser, before its blocks
_OTHER: Final = (
    "modulation_table: a denoiser call had another timestep or guidance than the scheduler and the run's first call "
    "tell, and its output is wrong: call fluxfire.restore_pipeline(pipe) and optimize without modulation"
)


@dataclass(frozen=True, slots=True)
class ModulationStats:
    """Denoiser calls that took rows of a table, those that did not, tables made, the memory held, why it is off."""

    from_table: int
    computed: int
    tables: int
    kept_bytes: int
    reason: str


class Given(nn.Linear):
    """In the place of a modulation layer: takes its part of the numbers that the block is given. Holds the weights."""

    def __init__(self, layer: nn.Linear, start: int) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.start = start
        self.train(layer.training)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """(B, C) -> (B, this layer's)."""
        return numbers[:, self.start : self.start + self.out_features]


@dataclass(slots=True)
class _Table:
    """What is kept of one guidance branch in one run."""

    first: int = 0  # the step of the first row
    rows: list[torch.Tensor] = field(default_factory=list)  # for each block (S, B, C), then temb (S, B, D); or none
    embedded: dict[str, Any] = field(default_factory=dict)  # what embedders of the same inputs in every step made
    ids: Seen = field(default_factory=list)  # the positions among those inputs; `run.py` looks at the others
    timesteps: torch.Tensor | None = None  # (S,)
    guidance: torch.Tensor | None = None  # (B,)
    seal: Seal | None = None  # of what the rows were made of; None: nothing was made
    odd: torch.Tensor | None = None  # whether the last call was another than its row's; in pinned memory
    event: Any = None  # after which that can be read


class Modulation:
    """The modulation layers of one denoiser."""

    def __init__(self, pipe: Any, handle: Handle) -> None:
        family = family_of(pipe)
        self._denoiser: Any = handle.denoiser
        self.blocks = family.blocks(self._denoiser)
        self._norms = [norms_of(block, family.modulated) for block in self.blocks]
        self._layers: list[list[nn.Linear]] = [[norm.linear for norm in norms] for norms in self._norms]
        self._silus = {norm: norm.silu for norms in self._norms for norm in norms}
        self._given: dict[Any, Given] = {}
        self._seal: Seal | None = None
        self._other_forwards = {name for name in EMBEDDERS if "forward" in vars(getattr(self._denoiser, name))}
        self._embedders: set[str] = set()  # those that can be remembered, as of the seal
        self._waits = False  # whether the weights are in host memory while the denoiser is elsewhere
        self._reader: RunReader[_Table] = RunReader(pipe, family, _Table)
        self._signature = inspect.signature(self._denoiser.forward)
        self._pipe = weakref.ref(pipe)
        # Of the call under way: .rows, for each block (B, C), then temb, or None: computed; .embedded, its table's.
        self._local = threading.local()
        self._from_table = self._computed = self._tables = 0
        self._reason = ""

    def stats(self) -> ModulationStats:
        """A snapshot of the counts."""
        tables = self._reader.states()
        kept = sum(tensor.nbytes for table in tables for tensor in tensors_in([*table.rows, *table.embedded.values()]))
        return ModulationStats(self._from_table, self._computed, self._tables, kept, self._reason)

    @property
    def _scheduler(self) -> Any:
        return getattr(self._pipe(), "scheduler", None)

    def take(self, weights: str) -> None:
        """Puts `Given` in the place of every layer, and the weights where they are to wait."""
        self._waits = weights == "cpu"
        for norms, layers in zip(self._norms, self._layers, strict=True):
            starts = itertools.accumulate((layer.out_features for layer in layers), initial=0)
            for norm, layer, start in zip(norms, layers, starts, strict=False):
                if weights == "cpu" and layer.weight.device.type != "cpu":
                    for part in layer.parameters():
                        part.data = part.data.cpu().pin_memory()
                self._given[norm] = norm._modules["linear"] = Given(layer, start)
                norm._modules["silu"] = nn.Identity()

    def put_back(self) -> None:
        """Each layer in its place, beneath an adapter that came meanwhile."""
        self._follow()
        for norms, layers in zip(self._norms, self._layers, strict=True):
            for norm, layer in zip(norms, layers, strict=True):
                ours = self._given.pop(norm, None)
                holder = next((m for m in norm.modules() if ours in m._modules.values()), None) if ours else None
                if holder is None:
                    continue
                key = next(key for key, module in holder._modules.items() if module is ours)
                holder._modules[key] = layer
                norm._modules["silu"] = self._silus[norm]
                for part in layer.parameters() if self._waits else ():
                    part.data = part.data.to(self._denoiser.x_embedder.weight.device)  # where it is now

    def _follow(self) -> None:
        """Gives the layers the weights that somebody put in the place of theirs: `load_state_dict(assign=True)`."""
        for norms, layers in zip(self._norms, self._layers, strict=True):
            for norm, layer in zip(norms, layers, strict=True):
                if given := self._given.get(norm):
                    layer._parameters |= given._parameters

    def around_denoiser(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Finds this call's rows, making the table at the first one, and calls on."""
        if not self._given:  # it has stepped back
            return forward(*args, **kwargs)
        if self._seal is None or not self._seal.unbroken():
            if odd := next((norm for norm, ours in self._given.items() if norm._modules["linear"] is not ours), None):
                what = type(odd._modules["linear"])
                self._reason = (
                    f"stepped back: a {what.__module__.partition('.')[0]} {what.__name__} is on a modulation layer"
                )
                self.put_back()
                return forward(*args, **kwargs)
            self._follow()
            self._embedders = {name for name in EMBEDDERS if self._computes_as_made(name)}
            self._seal = self._sealed()
        call = self._reader.read(args, kwargs)
        inputs = self._signature.bind(*args, **kwargs).arguments
        self._local.rows = self._rows(call, inputs)
        self._from_table += self._local.rows is not None
        self._computed += self._local.rows is None
        try:
            return forward(*args, **kwargs)
        finally:
            self._local.rows = None

    def around_embedder(self, name: str, embedder: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`temb` of the table; what text and positions are embedded to, computed in a run's first call."""
        rows = getattr(self._local, "rows", None)
        if not rows or name not in self._embedders:
            return embedder(*args, **kwargs)
        if name == "time_text_embed":
            return rows[-1]
        embedded = self._local.embedded
        if name not in embedded:
            embedded[name] = embedder(*args, **kwargs)
        return embedded[name]

    def around_block(self, number: int, names: tuple[str, ...], block: Any, *args: Any, **kwargs: Any) -> Any:
        """Gives the block its numbers in the place of `temb`."""
        if not self._given:
            return block(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs if args else kwargs
        rows, temb = getattr(self._local, "rows", None), arguments["temb"]
        arguments["temb"] = rows[number] if rows else self._numbers(number, nn.functional.silu(temb))
        return block(**arguments)

    def _numbers(self, number: int, activated: torch.Tensor) -> torch.Tensor:
        """What the layers of a block make of (R, D): (R, C)."""
        device, parts = activated.device, []
        for layer in self._layers[number]:
            bias = None if layer.bias is None else layer.bias.to(device, non_blocking=True)
            parts.append(nn.functional.linear(activated, layer.weight.to(device, non_blocking=True), bias))
        return torch.cat(parts, dim=-1)

    def _rows(self, call: Call[_Table], inputs: Mapping[str, Any]) -> list[torch.Tensor] | None:
        table, timestep = call.state, inputs["timestep"]
        autocast = torch.is_autocast_enabled(timestep.device.type)
        if table is None or autocast or torch.is_grad_enabled():
            return None
        if table.seal is not self._seal:
            self._make(table, call, inputs)
        ids = [inputs["img_ids"], inputs["txt_ids"]]
        if not same(table.ids, ids):
            table.ids = seen(ids)
            table.embedded.pop("pos_embed", None)
        self._local.embedded = table.embedded
        step = call.step - table.first
        if not table.rows or step >= len(table.rows[0]):
            return None
        assert table.timesteps is not None
        self._read_odd(table)
        odd = (timestep != table.timesteps[step]).any()
        if table.guidance is not None:
            odd = odd | (inputs["guidance"] != table.guidance).any()
        if odd.device.type != "cuda":
            return None if odd.item() else [rows[step] for rows in table.rows]
        if table.odd is None:
            table.odd, table.event = torch.zeros((), dtype=torch.bool).pin_memory(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        table.odd.copy_(odd, non_blocking=True)
        table.event.record()
        if at_last_step(self._scheduler):
            self._read_odd(table)
        return [rows[step] for rows in table.rows]

    def _read_odd(self, table: _Table) -> None:
        """Waits for the last comparison, which a whole step has passed since."""
        if table.event is not None:
            table.event.synchronize()
            if table.odd is not None and table.odd.item():
                raise StepError(_OTHER)

    def _make(self, table: _Table, call: Call[_Table], inputs: Mapping[str, Any]) -> None:
        """The rows of this and all later steps, where this call's timestep is one of the scheduler's."""
        table.seal, table.first, table.rows, table.embedded = self._seal, call.step, [], {}
        table.odd = table.event = None
        if "time_text_embed" not in self._embedders:
            return
        timestep, guidance, pooled = inputs["timestep"], inputs.get("guidance"), inputs["pooled_projections"]
        embed = self._denoiser.time_text_embed
        known = getattr(self._scheduler, "timesteps", None)
        if not isinstance(known, torch.Tensor):
            return
        known = known.to(timestep.device).to(timestep.dtype) / 1000  # as the pipelines round it
        found = (known == timestep[0]).flatten().nonzero().flatten().tolist()
        if not found or not bool((timestep == timestep[0]).all()):
            return
        here = self._reader.position()  # which of several that rounding made one
        table.timesteps = known[here if here in found else found[0] :]
        table.guidance = None if guidance is None else guidance.clone()
        steps, batch, dtype = len(table.timesteps), len(pooled), inputs["hidden_states"].dtype
        times = (table.timesteps.to(dtype) * 1000).repeat_interleave(batch)  # as the denoiser's forward has them
        given = [times] if guidance is None else [times, (guidance.to(dtype) * 1000).expand(batch).repeat(steps)]
        temb = embed(*given, pooled.repeat(steps, 1))  # (S B, D)
        activated = nn.functional.silu(temb)
        made = [*(self._numbers(number, activated) for number in range(len(self.blocks))), temb]
        table.rows = [row.view(steps, batch, -1) for row in made]  # all or none: memory may have ended
        self._tables += 1

    def _computes_as_made(self, name: str) -> bool:
        """Whether an embedder is of torch's or diffusers' classes, and nothing acts on it but what moves weights."""
        embedder = getattr(self._denoiser, name)
        return name not in self._other_forwards and not any(
            not type(part).__module__.startswith(("torch.nn.", "diffusers."))
            or part._forward_hooks
            or part._forward_pre_hooks
            or (part is not embedder and "forward" in vars(part) and not vars(part).keys() & _MOVERS)
            for part in embedder.modules()
        )

    def _sealed(self) -> Seal:
        """What is the same as long as the embedders and the layers compute the same."""
        seal, embedders = Seal(), [getattr(self._denoiser, name) for name in EMBEDDERS]
        seal.hold(self._denoiser._modules, *EMBEDDERS)
        for name in self._embedders:
            seal.hold_unhooked(getattr(self._denoiser, name).modules())
        for norm, given in self._given.items():
            seal.hold(norm._modules, "linear")
            seal.hold(given._parameters, *given._parameters)
        for part in (*embedders, *itertools.chain.from_iterable(self._layers)):
            seal.hold_children(part)
            seal.hold_writes(part.parameters())
        return seal


def norms_of(block: Any, names: tuple[str, ...]) -> list[Any]:
    """Those of a block's modules that have a modulation layer."""
    return [block._modules[name] for name in names if name in block._modules]
