"""Changes of shape: heads and grids."""

from __future__ import annotations

from torch import Tensor

__all__ = [
    "for_rows",
    "from_grid",
    "heads_first",
    "merge_heads",
    "to_grid",
]

# By strides a view is one step in place of two, each of which costs the CPU a tenth of a launch.
# Gradients and graphs are better off without.


def heads_first(x: Tensor, dim: int, by_strides: bool = False) -> Tensor:
    """``[B, S, H*D]`` or ``[B, S, H, D]`` to ``[B, H, S, D]``.

    Args:
        x: Queries, keys or values.
        dim: D.
        by_strides: Whether no gradient and no graph asks how the view was made.
    """
    if x.ndim == 4:
        return x.transpose(1, 2)
    batch, tokens, channels = x.shape
    if by_strides and x.__class__ is Tensor and x.is_contiguous():
        size = batch, channels // dim, tokens, dim
        return x.as_strided(size, (tokens * channels, dim, channels, 1))
    return x.view(batch, tokens, channels // dim, dim).transpose(1, 2)


def merge_heads(o: Tensor, by_strides: bool = False) -> Tensor:
    """``[B, H, S, D]`` to ``[B, S, H*D]``; `by_strides` as in `heads_first`."""
    if by_strides and o.__class__ is Tensor:
        batch, heads, tokens, dim = o.shape
        channels = heads * dim
        if o.stride() == (tokens * channels, dim, channels, 1):
            return o.as_strided((batch, tokens, channels), (tokens * channels, channels, 1))
    return o.transpose(1, 2).flatten(2)


def for_rows(t: Tensor, batch: int) -> Tensor:
    """Keys or values ``[rows, H, K, D]``, each for as many rows of the batch that follow."""
    # Tokens first, as they lie in memory.
    each = t.transpose(1, 2).unsqueeze(1).expand(-1, batch // t.shape[0], -1, -1, -1)
    return each.flatten(0, 1).transpose(1, 2)


def from_grid(x: Tensor) -> Tensor:
    """``[B, C, ...]`` to ``[B, S, C]``, the spatial axes in one."""
    return x.flatten(2).transpose(1, 2)


def to_grid(x: Tensor, like: Tensor) -> Tensor:
    """``[B, S, C]`` back to the spatial shape of `like`, ``[B, C', ...]``."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, *like.shape[2:])
