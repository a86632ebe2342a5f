"""torch's attention of packed sequences: padding costs nothing, no mask is made."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Scoring
from .base import Kernel, package
from .packed import pack, packable, span
from .takes import HALF, Takes
from .visible import limits

__all__ = ["VARLEN", "varlen", "varlen_lse"]

_MODULE, _INSTALL = "torch.nn.attention.varlen", "pip install 'torch>=2.10'"


def varlen(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` over the keys that are no padding."""
    return varlen_lse(q, k, v, scoring)[0]


def varlen_lse(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """`varlen` and the log-sum-exp of its scores ``[B, H, Q]``, which has no gradient."""
    module = package(_MODULE, _INSTALL)
    batch, heads, queries, _ = q.shape
    scale = scoring.scale
    if isinstance(scale, Tensor):
        q, scale = q * scale.to(q.dtype), 1.0
    packed = pack(k, v, scoring)
    left, right = limits(scoring)
    o, lse = module.varlen_attn(
        q.transpose(1, 2).flatten(0, 1),
        packed.k,
        packed.v,
        span(batch, queries, q.device),
        packed.starts,
        queries,
        k.shape[2],
        return_aux=module.AuxRequest(lse=True),
        scale=scale,
        window_size=(-1 if left is None else left, -1 if right is None else right),
        enable_gqa=heads != k.shape[1],
    )
    # Some versions give [H, B*Q], some [B*Q, H].
    lse = lse if lse.shape[0] == heads else lse.transpose(0, 1)
    lse = lse.unflatten(1, (batch, queries)).transpose(0, 1)
    o = o.unflatten(0, (batch, queries)).transpose(1, 2)
    empty = packed.empty[:, None, None]
    return o.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


VARLEN = Kernel(
    "varlen",
    varlen,
    takes=Takes(
        devices=("cuda",),
        dtypes=HALF,
        dims=(8, 256, 8),
        any_v=False,
        masks=frozenset({"keys", "causal", "window"}),
        lse=True,
        deterministic=False,
        needs=_MODULE,
        install=_INSTALL,
        also=packable,
    ),
    with_lse=varlen_lse,
)
