"""Attention without a softmax: ReLU features and a sum as normaliser (Sana, DC-AE).

Sources: https://arxiv.org/abs/2410.10629, https://arxiv.org/abs/2410.10733
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import factors
from ..types import Scoring
from . import triton
from .base import Kernel
from .fusing import fusable, is_transformed, keeps_nothing
from .reference import expand_heads

__all__ = ["RELU_ADAPTIVE", "RELU_LINEAR", "relu_adaptive", "relu_linear"]


# Channels a head up to which the fused kernel holds its sums.
_FUSED = 128


def relu_linear(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Weights ``relu(q) relu(k)`` over their sum, in O(tokens), computed in float32."""
    if fusable(q) and q.shape[1] == k.shape[1] and q.shape[3] == v.shape[3] <= _FUSED:
        weight = factors(scoring, k.dtype)
        k = k if weight is None else k * weight.transpose(-1, -2)
        return triton.linear.linear_attention(q, k, v.to(q.dtype), scoring.eps).to(v.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    # On a CPU what is written anyway is written as the next step reads it: of factors whose heads
    # do not lie side by side torch makes copies.
    laid = q.is_cpu and q.__class__ is Tensor and keeps_nothing() and not is_transformed()
    # Each wide copy goes before the next comes: they set the peak of memory.
    keys = _weighted(_positive(expand_heads(k, q), wide, laid), scoring)
    state = keys.transpose(-1, -2) @ expand_heads(v, q).to(wide)  # [B, H, D, D]
    total = keys.sum(dim=-2).unsqueeze(-1)  # [B, H, D, 1]
    del keys
    queries = _positive(q, wide, laid)
    o, norm = queries @ state, queries @ total + scoring.eps
    del queries
    if not laid:
        return (o / norm).to(v.dtype)
    batch, heads, tokens, dim = o.shape
    return torch.div(o, norm, out=v.new_empty(batch, tokens, heads, dim).transpose(1, 2))


def _positive(t: Tensor, wide: torch.dtype, laid: bool) -> Tensor:
    """``relu(t)`` in a wide dtype; `laid` with the tokens of a head side by side."""
    if not laid:
        return F.relu(t).to(wide)
    room = t.new_empty(t.shape, dtype=wide)
    # torch writes no such outcome in another dtype.
    return torch.clamp_min(t, 0, out=room) if t.dtype == wide else room.copy_(t).clamp_min_(0)


def relu_adaptive(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`relu_linear` where that is less work, else the same weights through a ``[K, Q]`` matrix."""
    if q.shape[2] > q.shape[3]:
        return relu_linear(q, k, v, scoring)
    k = _weighted(F.relu(expand_heads(k, q)), scoring)
    weights = _at_least_single(F.relu(q) @ k.transpose(-1, -2))
    weights = weights / (weights.sum(dim=-1, keepdim=True) + scoring.eps)
    return weights.to(v.dtype) @ expand_heads(v, q)


def _weighted(k: Tensor, scoring: Scoring) -> Tensor:
    weight = factors(scoring, k.dtype)
    return k if weight is None else k * weight.transpose(-1, -2)


def _at_least_single(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


RELU_LINEAR = Kernel("relu_linear", relu_linear, linear=True)
RELU_ADAPTIVE = Kernel("relu_adaptive", relu_adaptive, linear=True)
