"""Norms of queries and keys, as the module holds them.

Whether a norm spans one head or all of them is read off the norm itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .types import QKV, Site, Streams

__all__ = ["each_its_own", "one_for_both", "unnormed"]


def each_its_own(at: Site, streams: Streams) -> None:
    """`norm_q`, `norm_k` for the image; `norm_added_q`, `norm_added_k` for the text."""
    _norm(at.attn, "norm_q", "norm_k", streams.image)
    if streams.text is not None:
        _norm(at.attn, "norm_added_q", "norm_added_k", streams.text)


def one_for_both(at: Site, streams: Streams) -> None:
    """`norm_q`, `norm_k` for image and text."""
    _norm(at.attn, "norm_q", "norm_k", streams.image)
    if streams.text is not None:
        _norm(at.attn, "norm_q", "norm_k", streams.text)


def unnormed(at: Site, streams: Streams) -> None:
    """No norm."""


def _norm(attn: Any, norm_q: str, norm_k: str, stream: QKV) -> None:
    of_q, of_k = getattr(attn, norm_q, None), getattr(attn, norm_k, None)
    if of_q is not None:
        stream.q = _apply(of_q, stream.q)
    if of_k is not None:
        stream.k = _apply(of_k, stream.k)


def _apply(norm: nn.Module, x: Tensor | None) -> Tensor | None:
    """The norm of ``[B, S, H, D]``, over ``D`` or over ``H*D``."""
    if x is None:
        return x
    heads, dim = x.shape[2:]
    if heads > 1 and _width(norm) == heads * dim:
        return norm(x.flatten(2)).unflatten(2, (heads, dim))
    return norm(x)


def _width(norm: nn.Module) -> int | None:
    """Channels that the norm spans; None for one that takes any number."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return shape[0] if isinstance(shape, tuple) else None
