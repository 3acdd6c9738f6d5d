"""FlashAttention-4 as torch calls it: torch imports this module by its name when "fa4" is activated.

torch 2.11 to 2.13 take two results of its forward function, the output and the log-sum-exp; from flash-attn-4 4.0.0b19
on there are more of them, so that each call would fail. What is asked for and what comes back is the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

NAME: Final = "FLUXFIRE-FA4"  # beside torch's own "FA4"
INTERFACE: Final = "flash_attn.cute.interface"


def _flash_attn_fwd(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    out, lse, *_ = importlib.import_module(INTERFACE)._flash_attn_fwd(*args, **kwargs)
    return out, lse


def _flash_attn_bwd(*args: Any, **kwargs: Any) -> Any:
    return importlib.import_module(INTERFACE)._flash_attn_bwd(*args, **kwargs)


def register() -> list[str]:
    """Tells torch of it, once, where torch has a place for FlashAttention-4; the names that torch knows then."""
    attention: Any = torch.nn.attention
    known: Callable[[], list[str]] = getattr(attention, "list_flash_attention_impls", list)  # torch >= 2.11 has it
    if "FA4" in known() and NAME not in known():
        shim = importlib.import_module("torch.nn.attention._fa4").register_flash_attention_fa4
        attention.register_flash_attention_impl(NAME, register_fn=partial(shim, __name__))
    return known()
