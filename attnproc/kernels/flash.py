"""The flash-attn packages, versions 2, 3 and 4, from their own modules or from the hub.

Tested against recorded stand-ins; the three differ in names of arguments and in what they return.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from ..types import Keys, Scoring
from .base import Kernel, package
from .packed import TAKES, pack
from .reference import factor
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
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o, lse, *_ = _called(module.flash_attn_func, q, k, v, options)
    return o.transpose(1, 2), lse


def _packed(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    packed = pack(q, k, v, scoring)
    options = {
        **options,
        "cu_seqlens_q": packed.q_starts,
        "cu_seqlens_k": packed.k_starts,
        "max_seqlen_q": packed.lengths[0],
        "max_seqlen_k": packed.lengths[1],
    }
    o, lse, *_ = _called(function, packed.q, packed.k, packed.v, options)
    return packed.output(o), packed.lse(lse)


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
    takes = replace(TAKES, traceable=False, needs=library.module, install=library.install)
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
