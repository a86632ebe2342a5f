"""torch's attention of packed sequences: padding costs nothing, no mask is made."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..tracing import constant
from ..types import Scoring
from .base import Kernel, package
from .packed import TAKES, pack, packable
from .reference import expand_heads, factor
from .takes import Ask, missing
from .visible import limits

__all__ = ["VARLEN", "varlen", "varlen_lse"]

_MODULE, _INSTALL = "torch.nn.attention.varlen", "pip install 'torch>=2.10'"


def varlen(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` over the keys that are no padding."""
    return varlen_lse(q, k, v, scoring)[0]


def varlen_lse(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """`varlen` and the log-sum-exp of its scores ``[B, H, Q]``, which has no gradient."""
    module = package(_MODULE, _INSTALL)
    scale = factor(q, scoring)
    if isinstance(scale, Tensor) or not _has("scale"):
        q, scale = q * (scale * q.shape[-1] ** 0.5), None
    options: dict[str, Any] = {"scale": scale} if _has("scale") else {}
    if q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
        if not _has("enable_gqa"):
            k, v = expand_heads(k, q), expand_heads(v, q)
            del options["enable_gqa"]
    left, right = limits(scoring)
    if _has("window_size"):
        options["window_size"] = (-1 if left is None else left, -1 if right is None else right)
    elif right == 0:
        options["is_causal"] = True

    packed = pack(q, k, v, scoring)
    o, lse = module.varlen_attn(
        packed.q,
        packed.k,
        packed.v,
        packed.q_starts,
        packed.k_starts,
        *packed.lengths,
        return_aux=module.AuxRequest(lse=True),
        **options,
    )
    return packed.output(o), packed.lse(lse)


@constant
def _has(argument: str) -> bool:
    """Whether this torch's function has an argument that some versions lack."""
    module = package(_MODULE, _INSTALL)
    return argument in inspect.signature(module.varlen_attn).parameters


def _also(asked: Ask) -> str | None:
    # Where the module is missing, that is the reason.
    if "window" in asked.kinds and missing(_MODULE, _INSTALL) is None and not _has("window_size"):
        return "mask window: this version of torch has none"
    return packable(asked)


VARLEN = Kernel(
    "varlen",
    varlen,
    takes=replace(TAKES, needs=_MODULE, install=_INSTALL, also=_also),
    with_lse=varlen_lse,
)
