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
    if q.is_cpu and q.__class__ is Tensor and keeps_nothing() and not is_transformed():
        return _in_place(q, expand_heads(k, q), expand_heads(v, q), scoring)
    # Each wide copy goes before the next comes: they set the peak of memory.
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = _weighted(F.relu(expand_heads(k, q)).to(wide), scoring)
    state = keys.transpose(-1, -2) @ expand_heads(v, q).to(wide)  # [B, H, D, D]
    total = keys.sum(dim=-2).unsqueeze(-1)  # [B, H, D, 1]
    del keys
    queries = F.relu(q).to(wide)
    o, norm = queries @ state, queries @ total + scoring.eps
    del queries
    o = o / norm
    return o.to(v.dtype)


def _in_place(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """The same without gradients: what is written anyway is written as the next step reads it.

    By itself torch copies each factor of a product once more, so that heads lie side by side.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    room = k.new_empty(k.shape, dtype=wide)
    keys = _weighted(_positive(k, room), scoring)
    state = keys.transpose(-1, -2) @ v.to(wide)
    total = keys.sum(dim=-2).unsqueeze(-1)
    del keys
    queries = _positive(q, room if q.shape == k.shape else q.new_empty(q.shape, dtype=wide))
    o, norm = queries @ state, (queries @ total).add_(scoring.eps)
    # What they took the outcome takes.
    del queries, room
    batch, heads, tokens, dim = o.shape
    into = v.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return torch.div(o, norm, out=into)


def _positive(t: Tensor, room: Tensor) -> Tensor:
    """``relu(t)`` in a room of its shape, of its dtype or a wider one."""
    if room.dtype == t.dtype:
        return torch.clamp_min(t, 0, out=room)
    return room.copy_(t).clamp_min_(0)


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
