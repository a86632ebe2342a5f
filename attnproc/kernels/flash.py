"""The flash-attn packages, versions 2, 3 and 4, from their own modules or from the hub.

Tested against recorded stand-ins; the three differ in names of arguments and in what they return.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..types import Keys, Scoring
from .base import Kernel, package
from .packed import pack, packable, span
from .reference import factor
from .takes import HALF, Takes
from .visible import limits

__all__ = ["FLASH2", "FLASH3", "FLASH4", "Library", "flash", "flash_lse"]


@dataclass(frozen=True)
class Library:
    """One of the packages.

    Args:
        module: What to import.
        install: How to get it.
        unlimited: How it writes a window without limit.
        wants_lse: The argument that asks for the log-sum-exp.
    """

    module: str
    install: str
    unlimited: int | None = -1
    wants_lse: str = "return_attn_probs"

    def load(self) -> Any:
        """Imports it."""
        return package(self.module, self.install)


def flash(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, library: Any) -> Tensor:
    """`flash_attn_func`, or `flash_attn_varlen_func` over the keys that are no padding."""
    return flash_lse(q, k, v, scoring, library)[0]


def flash_lse(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, library: Any
) -> tuple[Tensor, Tensor]:
    """`flash` and the log-sum-exp of its scores ``[B, H, Q]``."""
    module = library.load()
    left, right = (library.unlimited if n is None else n for n in limits(scoring))
    options = {
        "softmax_scale": factor(q, scoring),
        "window_size": (left, right),
        library.wants_lse: True,
    }
    if scoring.dropout:
        options["dropout_p"] = scoring.dropout
    if isinstance(scoring.mask, Keys):
        return _packed(module.flash_attn_varlen_func, q, k, v, scoring, options)
    o, lse, *_ = _called(module.flash_attn_func, *(t.transpose(1, 2) for t in (q, k, v)), options)
    return o.transpose(1, 2), lse


def _packed(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    batch, _, queries, _ = q.shape
    packed = pack(k, v, scoring)
    options = {
        **options,
        "cu_seqlens_q": span(batch, queries, q.device),
        "cu_seqlens_k": packed.starts,
        "max_seqlen_q": queries,
        "max_seqlen_k": k.shape[2],
    }
    flat = q.transpose(1, 2).flatten(0, 1)
    o, lse, *_ = _called(function, flat, packed.k, packed.v, options)
    o = o.unflatten(0, (batch, queries)).transpose(1, 2)
    lse = lse.unflatten(1, (batch, queries)).transpose(0, 1)  # from [H, B*Q]
    empty = packed.empty[:, None, None]
    return o.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


def _called(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> Any:
    """Versions without an argument for the log-sum-exp give it always."""
    known = _names(function)
    asks = ("return_attn_probs", "return_lse")
    given = {name: x for name, x in options.items() if name in known or name not in asks}
    return function(q, k, v, **given)


@cache
def _names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _kernel(name: str, library: Library, **changes: Any) -> Kernel:
    takes = Takes(
        devices=("cuda",),
        dtypes=HALF,
        dims=(8, 256, 8),
        any_v=False,
        masks=frozenset({"keys", "causal", "window"}),
        lse=True,
        deterministic=False,
        traceable=False,
        needs=library.module,
        install=library.install,
        also=packable,
    )
    return Kernel(name, flash, (library,), takes=replace(takes, **changes), with_lse=flash_lse)


FLASH2 = _kernel(
    "flash", Library("flash_attn", "pip install flash-attn --no-build-isolation"), dropout=True
)
FLASH3 = _kernel(
    "flash3",
    Library("flash_attn_interface", "build hopper/ of github.com/Dao-AILab/flash-attention"),
)
FLASH4 = _kernel(
    "flash4", Library("flash_attn.cute", "pip install flash-attn-4", None, "return_lse")
)
