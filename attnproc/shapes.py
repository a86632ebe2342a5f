"""Changes of shape: heads and grids."""

from __future__ import annotations

from torch import Tensor

__all__ = [
    "from_grid",
    "merge_heads",
    "to_grid",
]


def merge_heads(o: Tensor) -> Tensor:
    """``[B, H, S, D]`` to ``[B, S, H*D]``."""
    return o.transpose(1, 2).flatten(2)


def from_grid(x: Tensor) -> Tensor:
    """``[B, C, ...]`` to ``[B, S, C]``, the spatial axes in one."""
    return x.flatten(2).transpose(1, 2)


def to_grid(x: Tensor, like: Tensor) -> Tensor:
    """``[B, S, C]`` back to the spatial shape of `like`, ``[B, C', ...]``."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, *like.shape[2:])
