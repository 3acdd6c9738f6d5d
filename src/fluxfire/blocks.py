"""What fluxfire knows of each FLUX family: its denoiser, the denoiser's blocks in order, what they take and return.

Everything that depends on a family's tensors stands here; `run.py` and `cache.py` speak of streams and tokens only.

Shapes: B samples, T text tokens, L image tokens (noise and reference pictures), D channels. A block takes and returns
either two streams, `encoder_hidden_states` (B, T, D) and `hidden_states` (B, L, D), or one: both, (B, T + L, D), as
FLUX.2's single blocks do, or only tokens of one kind, as the first blocks of FLUX.3.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from fluxfire.errors import NotFluxError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Family:
    """One denoiser class of diffusers and how to read its calls."""

    name: str
    denoiser_class: str
    block_lists: tuple[str, ...]  # of the denoiser, in the order in which they run, from the first with noise tokens on
    conditioning: tuple[str, ...]  # arguments of a denoiser call that tell one guidance branch from another
    per_sample: tuple[str, ...]  # arguments of a block, besides its two streams, that hold a row for each sample
    modulated: tuple[str, ...] = ()  # of a block: norms with a modulation layer that sees `temb`
    static_lists: tuple[str, ...] = ()  # of the denoiser: blocks with the same inputs in every step of a run

    def blocks(self, denoiser: Any) -> list[torch.nn.Module]:
        """The blocks of the denoiser, in the order in which they run, from the first that sees noise tokens on."""
        return [block for name in self.block_lists for block in operator.attrgetter(name)(denoiser)]

    def static_blocks(self, denoiser: Any) -> list[list[torch.nn.Module]]:
        """The lists of blocks that compute the same in every step of a run, each in order."""
        return [list(operator.attrgetter(name)(denoiser)) for name in self.static_lists]

    def conditioning_tensors(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of one denoiser call that stay the same objects over the steps of a guidance branch."""
        tensors = [inputs[name] for name in self.conditioning if inputs.get(name) is not None]
        extra = (inputs.get("joint_attention_kwargs") or {}).get("ip_adapter_image_embeds")
        return tensors + list(tensors_in(extra))

    def splits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the samples of this denoiser call can be computed apart: not where a key-value cache is passed on."""
        return inputs.get("kv_cache") is None

    def rows(self, arguments: Mapping[str, Any], rows: torch.Tensor, batch: int) -> dict[str, Any]:
        """The arguments of a block for some samples only: `rows` of everything that holds one for each of `batch`."""
        return {
            name: _rows(value, rows, batch) if name in self.per_sample else value for name, value in arguments.items()
        }

    def noise_tokens(self, inputs: Mapping[str, Any]) -> int | None:
        """How many of the first image tokens are noise; the others belong to reference pictures. One device transfer.

        The first position id is 0 for noise tokens and counts up for reference pictures (Kontext, FLUX.2); FLUX.3's
        have an argument of their own. None for the call that only fills Klein-KV's key-value cache: it has the
        references first and is made once a run.
        """
        if inputs.get("kv_cache_mode") == "extract":
            return None
        ids = inputs["img_ids"]  # (L, 3), (B, L, 3), (L, 4) or (B, L, 4)
        noise = ids.reshape(-1, *ids.shape[-2:])[0, :, 0] == 0
        count, leading = torch.stack([noise.sum(), noise.long().cumprod(0).sum()]).tolist()
        # Anything but noise first, references after is unknown to us: then all tokens count.
        return int(count) if 0 < count == leading else int(ids.shape[-2])


FAMILIES: Final = (
    Family(
        name="FLUX.1",
        denoiser_class="FluxTransformer2DModel",
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        conditioning=("encoder_hidden_states", "pooled_projections"),
        per_sample=("temb", "joint_attention_kwargs"),
        modulated=("norm1", "norm1_context", "norm"),
    ),
    Family(
        name="FLUX.2",
        denoiser_class="Flux2Transformer2DModel",
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        conditioning=("encoder_hidden_states",),
        per_sample=("temb_mod_img", "temb_mod_txt", "temb_mod", "joint_attention_kwargs"),
    ),
    Family(
        name="FLUX.3",
        denoiser_class="Flux3Transformer2DModel",
        # `txt_mode_blocks` run before them in every call.
        block_lists=("mode_blocks.image", "mode_blocks.image_cond", "single_transformer_blocks"),
        conditioning=("encoder_hidden_states", "image_cond_hidden_states", "txt_ids", "image_cond_ids"),
        per_sample=("temb_mod", "temb_mod_context"),
        static_lists=("txt_mode_blocks", "mode_blocks.image_cond"),
    ),
)


GROUP_HOOKS: Final = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's denoiser.

    Raises:
        NotFluxError: `pipe` has none of a FLUX family that fluxfire knows.
    """
    family_of(pipe)
    return pipe.transformer


def family_of(pipe: Any) -> Family:
    """The FLUX family of the pipeline's denoiser.

    Raises:
        NotFluxError: `pipe` has no denoiser of a FLUX family that fluxfire knows.
    """
    denoiser = getattr(pipe, "transformer", None)
    names = {cls.__name__ for cls in type(denoiser).__mro__}
    for family in FAMILIES:
        if family.denoiser_class in names:
            return family
    if "OptimizedModule" in names:
        raise NotFluxError(
            f"found a {type(pipe).__name__} whose transformer is wrapped by torch.compile(), needed the module itself: "
            "pipe.transformer = pipe.transformer._orig_mod, and fluxfire compiles it"
        )
    known = ", ".join(family.denoiser_class for family in FAMILIES)
    found = f"whose transformer is a {type(denoiser).__name__}" if denoiser is not None else "without a transformer"
    raise NotFluxError(
        f"found a {type(pipe).__name__} {found}; needed a diffusers pipeline whose transformer is one of {known}, "
        'such as diffusers.FluxKontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev")'
    )


def wrapped_by(module: torch.nn.Module) -> str | None:
    """What already stands between a caller and the module's own forward, or in its parts, and how it goes; or None."""
    for part in module.modules():
        if hook := vars(part).get("_hf_hook"):
            return f"accelerate's {type(hook).__name__}: pipe.remove_all_hooks(), and fluxfire.apply_offload afterwards"
        if names := list(getattr(vars(part).get("_diffusers_hook"), "hooks", ())):
            after = ", and fluxfire.apply_offload afterwards" * (names[0] in GROUP_HOOKS)
            return f"diffusers' hook {', '.join(names)}: load the pipeline anew without it{after}"
    if "forward" in vars(module) and not is_own(module, "forward"):
        return f"{code_of(vars(module)['forward'])}: take that off"
    return None


def compiled_by_others(modules: Iterable[torch.nn.Module]) -> str | None:
    """Why our graphs cannot be made in these modules, and no decision around them: somebody compiled them. Or None."""
    for module in modules:
        # torch.compile(module.forward) put in the place of forward leaves this on it, and on what wraps it.
        forward = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        if module._compiled_call_impl is not None or forward:
            return (
                f"found {type(module).__name__} compiled by torch.compile(), module.compile() or "
                "compile_repeated_blocks(), whose graphs would hold what is put around the blocks: load the pipeline "
                "anew and use fluxfire.apply_compile(pipe)"
            )
    return None


def parallel(denoiser: Any) -> str | None:
    """Why no step may decide what to compute: processes that wait for each other share the denoiser. Or None."""
    kinds = {cls.__name__ for parameter in denoiser.parameters() for cls in type(parameter).__mro__}
    found = next(
        (
            what
            for what, whether in (
                ("diffusers' enable_parallelism()", getattr(denoiser, "_parallel_config", None) is not None),
                ("ParaAttention's parallelize_pipe()", getattr(denoiser, "_is_parallelized", False)),
                ("DTensor parameters, as tensor parallelism and FSDP make them", "DTensor" in kinds),
            )
            if whether
        ),
        None,
    )
    return found and (
        f"found {found}, needed a denoiser whole in each process: ranks that decide differently wait for each other "
        "for ever. Type optimize_pipeline(pipe, cache_threshold=None), or load the pipeline without parallelism"
    )


def is_own(owner: Any, name: str) -> bool:
    """Whether `owner.name` is, in the instance too, the method of its class."""
    return getattr(vars(owner).get(name), "__func__", None) is getattr(type(owner), name, name)


def code_of(value: Any) -> str:
    """The function behind `value`, by its code: `update_wrapper` gives wrappers the name of what they wrap."""
    code = getattr(getattr(value, "func", value), "__code__", None)
    return f"{code.co_qualname} ({code.co_filename})" if code else repr(value)


def offload_hook(module: torch.nn.Module) -> str | None:
    """The first hook of accelerate, or of diffusers' group offload, on the module or below it."""
    return next(filter(None, map(own_offload_hook, module.modules())), None)


def own_offload_hook(module: torch.nn.Module) -> str | None:
    """The hook of accelerate, or of diffusers' group offload, on the module itself."""
    if hook := vars(module).get("_hf_hook"):
        return type(hook).__name__
    return next(iter(group_hooks(module)), None)


def group_hooks(module: torch.nn.Module) -> list[str]:
    """The names of diffusers' group offload's hooks on this module."""
    registry = vars(module).get("_diffusers_hook")
    return [name for name in getattr(registry, "hooks", ()) if name in GROUP_HOOKS]


def _rows(value: Any, rows: torch.Tensor, batch: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[rows] if value.shape[:1] == (batch,) else value
    if isinstance(value, dict):
        return {name: _rows(item, rows, batch) for name, item in value.items()}
    return type(value)(_rows(item, rows, batch) for item in value) if isinstance(value, list | tuple) else value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]
