"""The peers, each as its own documentation says to use it with FLUX; only which steps hit is forced.

Each function takes (pipe, steps), changes the pipe, and returns what tells the last run's steps. A peer that is not
installed or cannot run raises: the bench makes that its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def compile_repeated_blocks(pipe: Any, steps: int) -> Callable[[], str]:
    """diffusers, https://huggingface.co/docs/diffusers/optimization/fp16#regional-compilation."""
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return str


class _EveryOther:
    """In the place of a cache's decision: makes it, and then says hit after a miss and miss after a hit.

    Args:
        decide: the peer's own decision.
        hit: what it returns for a hit.
        starts: whether this is a run's first call, which cannot hit.
    """

    def __init__(self, decide: Callable[..., bool], hit: bool, starts: Callable[[], bool]) -> None:
        self._decide, self._hit, self._starts = decide, hit, starts
        self._marks = ""

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        if self._starts():
            self._marks = ""
        self._decide(*args, **kwargs)
        self._marks += "." if self._marks.endswith("#") else "#"
        return self._hit if self._marks.endswith(".") else not self._hit

    def marks(self) -> str:
        """Of the last run."""
        return self._marks


def first_block_cache(pipe: Any, steps: int) -> Callable[[], str]:
    """diffusers, https://huggingface.co/docs/diffusers/optimization/cache#firstblockcache.

    Its hooks need a `cache_context` around each denoiser call. FluxPipeline opens one; for Kontext it is opened here.
    """
    from diffusers import FirstBlockCacheConfig, FluxKontextPipeline

    transformer = pipe.transformer
    if isinstance(pipe, FluxKontextPipeline):
        forward = transformer.forward

        @wraps(forward)
        def in_context(*args: Any, **kwargs: Any) -> Any:
            with transformer.cache_context("cond"):
                return forward(*args, **kwargs)

        transformer.forward = in_context
    transformer.enable_cache(FirstBlockCacheConfig(threshold=math.inf))
    leader = transformer.transformer_blocks[0]._diffusers_hook.get_hook("fbc_leader_block_hook")
    decide = leader._should_compute_remaining_blocks
    half = _EveryOther(decide, False, lambda: leader.state_manager.get_state().head_block_residual is None)
    leader._should_compute_remaining_blocks = torch.compiler.disable(half.__call__)  # type: ignore[no-untyped-call]
    return half.marks


def first_block_cache_compiled(pipe: Any, steps: int) -> Callable[[], str]:
    """The same with compiled blocks; with fullgraph=True, torch refuses the hooks' decision."""
    pipe.transformer.compile_repeated_blocks()
    return first_block_cache(pipe, steps)


def cache_dit_compiled(pipe: Any, steps: int) -> Callable[[], str]:
    """cache-dit (https://github.com/vipshop/cache-dit), F1B0: one block decides. Compiled by block.

    Its hooks on the pipeline's class and its contexts outlive the pipeline.
    """
    import cache_dit

    half = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=1e9,
        max_warmup_steps=1,
        max_continuous_cached_steps=1,
        num_inference_steps=steps,
    )
    cache_dit.enable_cache(pipe, cache_config=half)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)

    def marks() -> str:
        stats = cache_dit.summary(pipe, logging=False)[0]
        hits = set(stats.cached_steps)
        return "".join("." if step in hits else "#" for step in range(steps))

    return marks


def torchao_float8(pipe: Any, steps: int) -> Callable[[], str]:
    """Row-wise float8 of torchao (https://github.com/pytorch/ao), as diffusers-torchao does for FLUX.

    Without torchao's flags for inductor, with which a first call takes minutes. Importing torchao changes what
    diffusers and transformers do in this process.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(pipe.transformer, config)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return str


def original_recipe(pipe: Any, steps: int) -> Callable[[], str]:
    """The recipe of https://modal.com/blog/flux-3x-faster, para-attn repaired for today's diffusers.

    The repair is the one that users of the recipe made: single blocks get and return both streams. para-attn changes
    the pipeline's class, and the flags are inductor's for the whole process.
    """
    import torch._inductor.config as inductor
    from para_attn.first_block_cache import utils
    from para_attn.first_block_cache.diffusers_adapters import apply_cache_on_pipe
    from torch._inductor.fx_passes import post_grad

    utils.CachedTransformerBlocks.call_remaining_transformer_blocks = _remaining_blocks
    half = _EveryOther(utils.get_can_use_cache, True, lambda: utils.get_current_cache_context().get_current_step() == 0)
    utils.get_can_use_cache = torch.compiler.disable(half.__call__)  # type: ignore[no-untyped-call]
    apply_cache_on_pipe(pipe, residual_diff_threshold=0.12)
    pipe.transformer.fuse_qkv_projections()
    pipe.vae.fuse_qkv_projections()
    pipe.transformer.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    inductor.conv_1x1_as_mm = True
    inductor.coordinate_descent_check_all_directions = True
    inductor.coordinate_descent_tuning = True
    inductor.epilogue_fusion = False
    inductor.shape_padding = True
    post_grad.same_meta = _without_numbers(post_grad.same_meta)
    pipe.transformer = torch.compile(pipe.transformer, mode="max-autotune-no-cudagraphs", dynamic=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune-no-cudagraphs", dynamic=True)
    return half.marks


def _remaining_blocks(
    self: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs: Any
) -> Any:
    """All blocks but the first, with the residuals of both streams, in the place of para-attn's own walk."""
    image, text = hidden_states, encoder_hidden_states
    for block in (*self.transformer_blocks[1:], *self.single_transformer_blocks):
        text, image = block(hidden_states=image, encoder_hidden_states=text, **kwargs)
    image, text = image.contiguous(), text.contiguous()
    return image, text, image - hidden_states, text - encoder_hidden_states


def _without_numbers(same_meta: Callable[..., bool]) -> Callable[..., bool]:
    """The recipe's own workaround: symbolic numbers have no tensor size (torch 2.11 and 2.12)."""

    def guarded(*nodes: Any) -> bool:
        try:
            return same_meta(*nodes)
        except AttributeError:
            return False

    return guarded
