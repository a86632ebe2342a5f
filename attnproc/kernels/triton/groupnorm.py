"""Group norm of a grid that gives tokens: the norm and the transposing copy, in two passes.

The plain form is `torch.nn.GroupNorm` over ``[B, C, S]``, transposed. The first pass finds mean
and squares of parts of each group, the second puts them together and writes normed tokens, in
float32 with one rounding at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, Plans, Repeated

__all__ = ["fits", "group_norm"]

# Elements of a part, and how many parts of a group the second pass puts together.
_PART = 8192
_MOST = 128
# Channels and tokens of a tile: rows of 128 bytes each way in half precision.
_TILE = 64


@Launcher
@triton.jit
def _moments(x, found, size, groups, batch_stride, PART: tl.constexpr):
    """Mean of a part of a group, and squares of what is beside it."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x = x + (row // groups) * batch_stride + (row % groups) * size
    places = part * PART + tl.arange(0, PART)
    live = places < size
    values = tl.load(x + places, mask=live, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / tl.minimum(size - part * PART, PART)
    beside = tl.where(live, values - mean, 0.0)
    found = found + (row * tl.num_programs(0) + part) * 2
    tl.store(found, mean)
    tl.store(found + 1, tl.sum(beside * beside, axis=0))


@triton.jit
def _whole(
    found, rows, live, size, eps, PARTS: tl.constexpr, PARTS_P: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Mean and factor of whole groups, by their rows of parts."""
    p = tl.arange(0, PARTS_P)
    counts = tl.minimum(tl.maximum(size - p * PART, 0), PART).to(tl.float32)[None, :]
    places = (rows[:, None] * PARTS + p[None, :]) * 2
    inside = live[:, None] & (p < PARTS)[None, :]
    means = tl.load(found + places, mask=inside, other=0.0)
    squares = tl.load(found + places + 1, mask=inside, other=0.0)
    mean = tl.sum(means * counts, axis=1) / size
    beside = means - mean[:, None]
    variance = tl.sum(squares + counts * beside * beside, axis=1) / size
    return mean, tl.rsqrt(variance + eps)


@Launcher
@triton.jit
def _normed(
    x, o, found, w, b, channels, length, groups, size, batch_stride, eps,
    PARTS: tl.constexpr, PARTS_P: tl.constexpr, PART: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A tile of normed tokens."""
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(channels, T)
    c, s = (tile % across) * T + tl.arange(0, T), (tile // across) * T + tl.arange(0, T)
    rows = batch * groups + c // (channels // groups)
    mean, factor = _whole(found, rows, c < channels, size, eps, PARTS, PARTS_P, PART)
    x = x + batch * batch_stride
    inside = (c < channels)[:, None] & (s < length)[None, :]
    y = tl.load(x + c[:, None] * length + s[None, :], mask=inside, other=0.0).to(tl.float32)
    y = (y - mean[:, None]) * factor[:, None]
    if w is not None:
        y = y * tl.load(w + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
    if b is not None:
        y = y + tl.load(b + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
    o = o + batch * length * channels
    inside = (s < length)[:, None] & (c < channels)[None, :]
    tl.store(
        o + s[:, None] * channels + c[None, :], tl.trans(y).to(o.dtype.element_ty), mask=inside
    )


def fits(x: Tensor, groups: int) -> bool:
    """Whether the passes take tokens ``[B, S, C]``: a grid's memory, and no endless groups."""
    _, length, channels = x.shape
    size = channels // groups * length
    return x.stride()[1:] == (1, length) and 0 < size <= _PART * _MOST


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normed tokens of a grid.

    Args:
        x: ``[B, S, C]``, a view of ``[B, C, S]``, as `fits` says.
        groups: How many groups there are, which divide C.
        weight: Factor of each channel ``[C]``, or None; in the dtype and on the device of `x`.
        bias: Summand of each channel ``[C]``, or None; as `weight`.
        eps: Added to the variance.

    Returns:
        ``[B, S, C]``, contiguous, in the dtype of `x`.
    """
    kind = (
        x.shape, x.stride(), x.dtype, x.get_device(), groups, weight is None, bias is None, eps,
    )  # fmt: skip
    try:
        parts, moments, normed = _LAUNCHES[kind]
    except KeyError:
        parts, moments, normed = _LAUNCHES.keep(kind, _new_launches(x, groups, eps))
    found = x.new_empty(x.shape[0], groups, parts, 2, dtype=torch.float32)
    o = x.new_empty(x.shape)
    moments(x, found)
    normed(x, o, found, weight, bias)
    return o


_LAUNCHES: Plans[tuple[int, Repeated, Repeated]] = Plans()


def _new_launches(x: Tensor, groups: int, eps: float) -> tuple[int, Repeated, Repeated]:
    """Parts of a group, and both passes, for calls of this kind."""
    batch, length, channels = x.shape
    size, stride = channels // groups * length, x.stride(0)
    parts = -(-size // _PART)
    tiles = -(-channels // _TILE) * -(-length // _TILE)
    moments = Repeated(_moments, (parts, batch * groups), (size, groups, stride), (_PART,))
    numbers = (channels, length, groups, size, stride, eps)
    fixed = (parts, 1 << (parts - 1).bit_length(), _PART, _TILE)
    return parts, moments, Repeated(_normed, (tiles, batch), numbers, fixed)
