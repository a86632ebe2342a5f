"""Tokens plus a grid, in one pass: each is read along its own lines of memory.

The plain form is a sum of a transposed view and a grid, which torch reads by single elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher

__all__ = ["tokens_plus_grid"]

# Channels and tokens of a tile: rows of 128 bytes each way in half precision.
_TILE = 64


@Launcher
@triton.jit
def _sum(y, x, o, channels, length, T: tl.constexpr):
    """A tile of tokens with the grid's values added."""
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(channels, T)
    c, s = (tile % across) * T + tl.arange(0, T), (tile // across) * T + tl.arange(0, T)
    start = batch * channels * length
    inside = (c < channels)[:, None] & (s < length)[None, :]
    grid = tl.load(x + start + c[:, None] * length + s[None, :], mask=inside, other=0.0)
    places = start + s[:, None] * channels + c[None, :]
    inside = (s < length)[:, None] & (c < channels)[None, :]
    found = tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
    found += tl.trans(grid).to(tl.float32)
    tl.store(o + places, found.to(o.dtype.element_ty), mask=inside)


def tokens_plus_grid(y: Tensor, x: Tensor) -> Tensor:
    """The sum, rounded once.

    Args:
        y: ``[B, C, height, width]``, channels last in memory, as tokens are that became a grid.
        x: ``[B, C, height, width]``, contiguous, in the dtype of `y`.

    Returns:
        ``[B, C, height, width]``, channels last in memory, in the dtype of `y`.
    """
    batch, channels, height, width = y.shape
    o, length = torch.empty_like(y), height * width
    tiles = -(-channels // _TILE) * -(-length // _TILE)
    if o.numel():
        _sum((tiles, batch), (y, x, o), (channels, length), (_TILE,))
    return o
