"""Attention among few tokens by a kernel of its own: frames of a video, one row a place.

torch's kernels are made for long sequences, and fill a tile of 64 queries or more whatever there
is to fill it with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Scoring
from . import triton
from .base import Kernel
from .fusing import INTERPRETED, fusable, is_autocast, is_wanted
from .takes import HALF, Ask, Takes

__all__ = ["SHORT", "is_short", "worth_it"]

# Tokens that a program takes, and channels of a head.
_TOKENS, _CHANNELS = 64, 128
# Heads of all rows together from which on it is faster than torch's kernels.
_HEADS = 2048


def short(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Softmax attention among at most 64 queries and keys, a program a head."""
    q, scale = scoring.scaled(q)
    if not (q.stride(3) == k.stride(3) == v.stride(3) == 1):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if not fusable(q):
        raise ValueError("backend 'short' goes with no transform of torch.func")
    return triton.short.attended(q, k, v, scoring.causal, scale)


def is_short(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call is one that the kernel is made for."""
    batch, heads, queries, _ = q.shape
    if not _pays(batch * heads, queries, k.shape[2]):
        return False
    if not (q.dtype is k.dtype is v.dtype and fusable(q)):
        return False
    # Autocast has attention in half precision.
    return q.dtype.itemsize == 2 or not is_autocast(q)


def worth_it(asked: Ask) -> bool:
    """As `is_short`, of a kind of call; what else masks or is asked is for `SHORT.takes`."""
    return _pays(asked.batch * asked.heads, asked.queries, asked.keys)


def _pays(heads: int, queries: int, keys: int) -> bool:
    return queries <= _TOKENS and keys <= _TOKENS and heads >= _HEADS


def _few(asked: Ask) -> str | None:
    if not is_wanted():
        return "fused kernels are turned off"
    if asked.queries > _TOKENS or asked.keys > _TOKENS or not asked.keys:
        return f"{asked.queries} queries and {asked.keys} keys: it takes 1 to {_TOKENS}"
    return None


SHORT = Kernel(
    "short",
    short,
    takes=Takes(
        devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
        dtypes=(*HALF, torch.float32),
        dims=(1, _CHANNELS, 1),
        any_v=False,
        masks=frozenset({"causal"}),
        needs="triton",
        install="pip install triton",
        also=_few,
    ),
)
