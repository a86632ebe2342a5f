"""Changes of shape: heads, grids, joint sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .types import QKV, Streams

__all__ = [
    "from_grid",
    "head_dim",
    "join",
    "merge_heads",
    "split_heads",
    "split_stream",
    "to_grid",
]


def head_dim(attn: Any, q: Tensor) -> int:
    """Channels a head of queries ``[B, S, H*D]`` or, split already, ``[B, S, H, D]``."""
    if q.ndim == 4:
        return q.shape[-1]
    return getattr(attn, "head_dim", None) or q.shape[-1] // attn.heads


def split_heads(x: Tensor | None, dim: int) -> Tensor | None:
    """``[B, S, H*D]`` to ``[B, S, H, D]``; what is split already stays."""
    return x if x is None or x.ndim == 4 else x.view(x.shape[0], x.shape[1], -1, dim)


def split_stream(stream: QKV, dim: int) -> None:
    """`split_heads` of all three; keys and values may have fewer heads than queries."""
    stream.q = split_heads(stream.q, dim)
    stream.k = split_heads(stream.k, dim)
    stream.v = split_heads(stream.v, dim)


def merge_heads(o: Tensor) -> Tensor:
    """``[B, H, S, D]`` to ``[B, S, H*D]``."""
    return o.transpose(1, 2).flatten(2)


def join(streams: Streams, text_first: bool) -> QKV:
    """One sequence of both streams, along the token axis of ``[B, S, H, D]``, using them up."""
    image, text = streams
    if text is None:
        return image
    first, last = (text, image) if text_first else (image, text)
    both = QKV(None, None, None)
    both.q, first.q, last.q = _cat(first.q, last.q), None, None
    both.k, first.k, last.k = _cat(first.k, last.k), None, None
    both.v, first.v, last.v = _cat(first.v, last.v), None, None
    return both


def _cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return torch.cat((a, b), dim=1)


def from_grid(x: Tensor) -> Tensor:
    """``[B, C, ...]`` to ``[B, S, C]``, the spatial axes in one."""
    return x.flatten(2).transpose(1, 2)


def to_grid(x: Tensor, like: Tensor) -> Tensor:
    """``[B, S, C]`` back to the spatial shape of `like`, ``[B, C', ...]``."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, *like.shape[2:])
