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
# Elements of a row of the batch from which on it takes a CPU longer than the calls for it.
_LONG = 1 << 16


def relu_linear(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Weights ``relu(q) relu(k)`` over their sum, in O(tokens), computed in float32."""
    if fusable(q) and q.shape[1] == k.shape[1] and q.shape[3] == v.shape[3] <= _FUSED:
        weight = factors(scoring, k.dtype)
        k = k if weight is None else k * weight.transpose(-1, -2)
        return triton.linear.linear_attention(q, k, v.to(q.dtype), scoring.eps).to(v.dtype)
    weight = factors(scoring, torch.promote_types(q.dtype, torch.float32))
    rows = q.shape[0]
    plain = q.is_cpu and q.__class__ is Tensor and keeps_nothing() and not is_transformed()
    if not plain or q.numel() < rows * _LONG:
        return _attended(q, k, v, weight, scoring.eps).to(v.dtype)
    # A row of the batch is read where it lies; of several at once torch makes copies.
    o = v.new_empty(rows, q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    for i in range(rows):
        row = slice(i, i + 1)
        of_row = weight if weight is None or len(weight) == 1 else weight[row]
        _attended(q[row], k[row], v[row], of_row, scoring.eps, o[row])
    return o


def _attended(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, eps: float, into: Tensor | None = None
) -> Tensor:
    """The outcome in float32 or wider, or rounded `into` a tensor of its shape."""
    # Each wide copy goes before the next comes: they set the peak of memory.
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = F.relu(expand_heads(k, q)).to(wide)
    if weight is not None:
        keys = keys * weight.transpose(-1, -2)
    state = keys.transpose(-1, -2) @ expand_heads(v, q).to(wide)  # [B, H, D, D]
    total = keys.sum(dim=-2).unsqueeze(-1)  # [B, H, D, 1]
    del keys
    queries = F.relu(q).to(wide)
    o, norm = queries @ state, queries @ total + eps
    del queries
    return torch.div(o, norm, out=into)


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
