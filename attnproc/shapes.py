"""Changes of shape: heads, grids, joint sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import QKV, Streams

__all__ = [
    "from_grid",
    "join",
    "merge_heads",
    "split_stream",
    "to_grid",
]


def split_stream(stream: QKV, dim: int) -> None:
    """``[B, S, H*D]`` to ``[B, S, H, D]``; what is split already stays.

    Keys and values may have fewer heads than queries.
    """
    q, k, v = stream.q, stream.k, stream.v
    if q is not None and q.ndim == 3:
        stream.q = q.view(q.shape[0], q.shape[1], -1, dim)
    if k is not None and k.ndim == 3:
        stream.k = k.view(k.shape[0], k.shape[1], -1, dim)
    if v is not None and v.ndim == 3:
        stream.v = v.view(v.shape[0], v.shape[1], -1, dim)


def merge_heads(o: Tensor) -> Tensor:
    """``[B, H, S, D]`` to ``[B, S, H*D]``."""
    return o.transpose(1, 2).flatten(2)


def join(streams: Streams, text_first: bool) -> QKV:
    """One sequence of both streams, along the token axis of ``[B, S, H, D]``, using them up."""
    image, text = streams.image, streams.text
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
    if a.device.type != "cpu":
        return torch.cat((a, b), dim=1)
    # The kernel of a CPU is faster where the tokens of a head lie side by side.
    return torch.cat((a.transpose(1, 2), b.transpose(1, 2)), dim=2).transpose(1, 2)


def from_grid(x: Tensor) -> Tensor:
    """``[B, C, ...]`` to ``[B, S, C]``, the spatial axes in one."""
    return x.flatten(2).transpose(1, 2)


def to_grid(x: Tensor, like: Tensor) -> Tensor:
    """``[B, S, C]`` back to the spatial shape of `like`, ``[B, C', ...]``."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, *like.shape[2:])
