"""SageAttention as an operator, which compiled graphs take whole.

Called as it is, it ends a graph: up to 2.2 it sets torch's device and calls functions that torch's compiler does not
know, so that `fullgraph=True` raises. diffusers calls it by a name of its module, so the repair is put there, for the
whole process, while a pipeline uses it: the results are the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

import torch

from fluxfire.patches import Workaround

PLAIN: Final = {"tensor_layout": "NHD", "is_causal": False, "sm_scale": None, "return_lse": False}


@torch.library.custom_op("fluxfire::sage", mutates_args=())
def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SageAttention of three (B, L, heads, channels)."""
    out: torch.Tensor = importlib.import_module("sageattention").sageattn(q, k, v, tensor_layout="NHD")
    return out.contiguous()


@sage.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


def _as_operator(sageattn: Callable[..., Any]) -> Callable[..., Any]:
    def by_operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> Any:
        return sage(q, k, v) if settings == PLAIN else sageattn(q, k, v, **settings)

    return by_operator


AS_OPERATOR: Final = Workaround("diffusers.models.attention_dispatch", "sageattn", bool, _as_operator)
