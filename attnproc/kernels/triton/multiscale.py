"""DC-AE's multi-scale products and its way out, with tokens in rows all the way.

The plain forms are the composed paths of `attnproc.layouts.multiscale` and
`attnproc.outputs.grid_out`. One buffer ``[B, S, scales * 3W]`` takes the products of the grid and
its convolved copies, so that nothing is joined or turned afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling

from ...packing import joined
from .launch import Launcher, Run, operator, padded, wrap_triton

__all__ = ["normed_grid", "scaled_products"]

# Channels of a convolving tile, if a group is not wider, so that a pixel's are a line of memory;
# its elements, 32 sums a thread, so that three programs run beside each other; its width.
_WIDE = 64
_HELD = 4096
_SIDE = 16
# Tokens and channels that a program of the way out holds at once.
_TOKENS = 32
_CHANNELS = 128
_PRECISION = tl.constexpr("tf32x3")


@Launcher
@triton.jit
def _convolve(
    products, taps, mix, all_scales, height, width, products_row, row, start, channels,
    K: tl.constexpr, D: tl.constexpr, CB: tl.constexpr, CP: tl.constexpr,
    TX: tl.constexpr, TY: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Some groups' channels of a tile of pixels: each with its ``K x K`` neighbours, then mixed.

    Products that stand in a buffer of their own are copied too. Programs of one tile follow one
    another: together they read whole rows.
    """
    blocks = tl.cdiv(channels, CB)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    wide, high = tl.cdiv(width, TX), tl.cdiv(height, TY)
    batch = (tile // (wide * high)).to(tl.int64)
    pixel, d = tl.arange(0, TX * TY), tl.arange(0, CP)
    x = tile % wide * TX + pixel % TX
    y = tile // wide % high * TY + pixel // TX
    c = block * CB + d
    there = (d < CB) & (c < channels)
    at = (batch * height * width + y * width + x).to(tl.int64)
    places = products + at[:, None] * products_row + c[None, :]
    sums = tl.zeros((TX * TY, CP), tl.float32)
    for i in range(K):
        down = i - K // 2
        live = (y + down >= 0) & (y + down < height)
        for j in tl.static_range(K):
            right = j - K // 2
            inside = live & (x + right >= 0) & (x + right < width)
            away = (down * width + right).to(tl.int64) * products_row
            known = inside[:, None] & there[None, :]
            values = tl.load(places + away, mask=known, other=0.0).to(tl.float32)
            tap = tl.load(taps + (i * K + j) * channels + c, mask=there, other=0.0)
            sums += values * tap.to(tl.float32)[None, :]
    # All groups in one product: what lies between two of them is zero.
    within = (d // D)[:, None] == (d // D)[None, :]
    known = within & there[:, None] & there[None, :]
    weight = tl.load(mix + c[None, :] * D + (d % D)[:, None], mask=known, other=0.0)  # [in, out]
    mixed = tl.dot(sums.to(weight.dtype), weight, input_precision=_PRECISION)
    known = ((y < height) & (x < width))[:, None] & there[None, :]
    found = all_scales + at[:, None] * row + c[None, :]
    tl.store(found + start, mixed.to(weight.dtype), mask=known)
    if COPIES:
        tl.store(found, tl.load(places, mask=known), mask=known)


@Launcher
@triton.jit
def _norm(
    y, x, weight, bias, o, tokens, eps, x_batch, x_channel, x_token,
    C: tl.constexpr, CB: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Tokens over their root mean square, plus a grid in whichever layout."""
    batch = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
    live = token < tokens
    rows = (batch * tokens + token)[:, None] * C
    squares = tl.zeros((T, CB), tl.float32)
    for first in range(0, C, CB):
        c = first + tl.arange(0, CB)
        inside = live[:, None] & (c < C)[None, :]
        part = tl.load(y + rows + c[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += part * part
    # Compiled code may hand numbers over in double precision.
    inverse = tl.rsqrt(tl.sum(squares, axis=1) / C + tl.cast(eps, tl.float32))
    for first in range(0, C, CB):
        c = first + tl.arange(0, CB)
        inside = live[:, None] & (c < C)[None, :]
        part = tl.load(y + rows + c[None, :], mask=inside, other=0.0).to(tl.float32)
        part *= inverse[:, None]
        if weight is not None:
            part *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            part += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if x is not None:
            places = batch * x_batch + c[None, :] * x_channel + token[:, None] * x_token
            part += tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(o + rows + c[None, :], part.to(o.dtype.element_ty), mask=inside)


def scaled_products(
    x: Tensor, weights: list[Tensor], taps: list[Tensor], mixes: list[Tensor]
) -> Tensor:
    """Products of a grid, and at each scale their depthwise convolution mixed within groups.

    There are no gradients; this holds for `normed_grid` too.

    Args:
        x: ``[B, C, height, width]``, in any layout of memory.
        weights: Of the products, each ``[W', C]``; all ``W'`` together are ``3W``.
        taps: Of the depthwise convolutions, one a scale, ``[3W, 1, K, K]`` with K odd.
        mixes: Of the grouped 1x1 convolutions, one a scale, ``[3W, D, 1, 1]``, D at most 128.

    Returns:
        ``[B, height * width, (1 + scales) * 3W]``: the products first, then the scales in order.
    """
    batch, _, height, width = x.shape
    compiling = is_compiling()
    # Compiled code can't ask where a tensor is. One product is soon ahead of three and no copy.
    whole = None if compiling else joined(weights)
    whole = torch.cat(weights) if whole is None else whole
    # The product reads a grid of either layout as it is.
    tokens, matrix = x.flatten(2).transpose(1, 2), whole.t().expand(batch, -1, -1)
    if compiling:
        products = torch.bmm(tokens, matrix)
        return _TRACED(products, taps, mixes, height, width) if taps else products
    channels = whole.shape[0]
    found = x.new_empty(batch, height * width, (1 + len(taps)) * channels)
    products = found[:, :, :channels]
    torch.bmm(tokens, matrix, out=products)
    _scale(products, taps, mixes, found, (height, width))
    return found


def normed_grid(
    y: Tensor, x: Tensor | None, like: Tensor, norm: tuple[Tensor | None, Tensor | None, float]
) -> Tensor:
    """``y / rms(y) * weight + bias + x`` as a grid.

    Args:
        y: ``[B, height * width, C]``.
        x: ``[B, C, height, width]``, in any layout of memory, or None.
        like: A grid of the wanted height and width.
        norm: Weight and bias, each ``[C]`` or None, and what guards the division.

    Returns:
        ``[B, C, height, width]``, channels last in memory.
    """
    weight, bias, eps = norm
    if is_compiling():
        o = torch.ops.attnproc.normed_tokens(y, x, weight, bias, eps)
    else:
        o = _normed(y, x, weight, bias, eps)
    return o.view(o.shape[0], *like.shape[2:], o.shape[2]).permute(0, 3, 1, 2)


@operator("attnproc::scales")
def _operator(
    products: Tensor, taps: list[Tensor], mixes: list[Tensor], height: int, width: int
) -> Tensor:
    products = products.contiguous()
    batch, tokens, channels = products.shape
    found = products.new_empty(batch, tokens, (1 + len(taps)) * channels)
    _scale(products, taps, mixes, found, (height, width), wrap_triton(_convolve), copies=True)
    return found


# By itself, as compiled code checks each name on the way to it.
_TRACED = torch.ops.attnproc.scales.default


@operator("attnproc::normed_tokens")
def _operator_out(
    y: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _normed(y, x, weight, bias, eps, wrap_triton(_norm))


def _scale(
    products: Tensor,
    taps: list[Tensor],
    mixes: list[Tensor],
    found: Tensor,
    size: tuple[int, int],
    run: Run = _convolve,
    *,
    copies: bool = False,
) -> None:
    """Writes all scales of products into ``[B, S, scales * 3W]``, whose first columns they are.

    With `copies` they stand elsewhere and are copied.
    """
    height, width = size
    batch, _, channels = products.shape
    row = found.shape[2]
    if not found.numel():
        return
    for i, (tap, mix) in enumerate(zip(taps, mixes, strict=True)):
        fixed = _tile(int(tap.shape[2]), int(mix.shape[1]))
        _, _, wide, _, across, down = fixed
        tiles = -(-width // across) * -(-height // down)
        run(
            (batch * tiles * -(-channels // wide), 1),
            # Turned, as a thread's channels are then one load: it takes a third less time.
            (products, tap.flatten(1).t().contiguous(), mix, found),
            (height, width, products.stride(1), row, (1 + i) * channels, channels),
            (*fixed, copies and i == 0),
        )


def _tile(size: int, dim: int) -> tuple[int, ...]:
    """Arguments of compilation: neighbours, channels of a group and of a tile, and its pixels."""
    wide = max(1, _WIDE // dim) * dim
    whole = padded(wide)
    return size, dim, wide, whole, _SIDE, max(1, _HELD // whole // _SIDE)


def _normed(
    y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    run: Run = _norm,
) -> Tensor:
    y = y.contiguous()
    batch, tokens, channels = y.shape
    o = torch.empty_like(y)
    if not o.numel():
        return o
    flat = None if x is None else x.flatten(2)
    strides = (0, 0, 0) if flat is None else flat.stride()
    channels = int(channels)
    run(
        (-(-tokens // _TOKENS), batch),
        (y, flat, weight, bias, o),
        (tokens, eps, *strides),
        (channels, min(_CHANNELS, 1 << (channels - 1).bit_length()), _TOKENS),
    )
    return o
