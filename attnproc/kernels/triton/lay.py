"""One pass from projections to the kernel's input: norm, rotary embedding, and joining streams.

The plain form is what `attnproc.prologue` composes of `attnproc.norms`, `attnproc.rotary` and
`attnproc.types.Streams.join`. Here each of queries, keys and values is read once and written once,
with float32 in between and one rounding at the end.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, is_grad_enabled
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from .launch import Launcher, Plans, Repeated, Run, operator, padded, wrap_triton

__all__ = ["Lay", "lay"]

# As `attnproc.norms.Formula.number` counts: none; root mean square; mean and deviation; length.
_NONE = tl.constexpr(0)
_RMS = tl.constexpr(1)
_LAYER = tl.constexpr(2)
_L2 = tl.constexpr(3)

# Elements that a program holds at a time, and of how many tokens at most: all heads of one come
# first, as a part of them would be followed by one that is half empty.
_HELD = 4096
_TOKENS = 2


class Lay(NamedTuple):
    """What is done to one of queries, keys and values, but for its tensors.

    Args:
        norms: Norm of the first and of the second stream, by `Formula.number`.
        eps: What guards each norm's division.
        across: Whether the norms span all heads.
        turns: Whether the first and the second stream are rotated.
        joint: Whether the rotary table counts positions of the joint sequence.
        width: Channels d and d + width / 2 of each group of `width` make a pair.
        turned: How many channels are rotated.
        step: How many channels share an entry of the table.
    """

    norms: tuple[int, int] = (0, 0)
    eps: tuple[float, float] = (0.0, 0.0)
    across: bool = False
    turns: tuple[bool, bool] = (False, False)
    joint: bool = False
    width: int = 2
    turned: int = 0
    step: int = 1

    def plainly(self) -> tuple[list[int], list[float]]:
        """As an operator takes it; see `_how`."""
        more = (self.joint, self.width, self.turned, self.step)
        ints = (*self.norms, self.across, *self.turns, *more)
        return [int(i) for i in ints], list(self.eps)


@triton.jit
def _inverse(total, count, eps, NORM: tl.constexpr):
    """What a norm multiplies by, given the sum of squares."""
    # Compiled code may hand numbers over in double precision.
    eps = tl.cast(eps, tl.float32)
    if NORM == _L2:
        inverse = 1.0 / tl.maximum(tl.sqrt(total), eps)
    else:
        inverse = tl.rsqrt(total / count + eps)
    return inverse


@triton.jit
def _at(ptr, tokens, live, h, d, stride, H: tl.constexpr, D: tl.constexpr):
    """A tile ``[T, HB, DP]`` of ``[S, H, D]`` in float32, zeros outside."""
    inside = live[:, None, None] & (h < H)[None, :, None] & ((d >= 0) & (d < D))[None, None, :]
    places = tokens[:, None, None] * stride + h[None, :, None] * D + d[None, None, :]
    return tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weight(ptr, h, d, ACROSS: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """A norm's weight ``[1, HB or 1, DP]``."""
    inside = (d < D)[None, None, :]
    places = d[None, None, :]
    if ACROSS:
        inside = inside & (h < H)[None, :, None]
        places = places + h[None, :, None] * D
    return tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _angle(
    ptr, rows, live, h, d, s_row, s_head, s_channel,
    PER_HEAD: tl.constexpr, STEP: tl.constexpr, TURNED: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Cosines or sines ``[T, HB or 1, DP]`` of a table."""
    inside = live[:, None, None] & (d < TURNED)[None, None, :]
    places = rows[:, None, None] * s_row + (d // STEP)[None, None, :] * s_channel
    if PER_HEAD:
        inside = inside & (h < H)[None, :, None]
        places = places + h[None, :, None] * s_head
    return tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_pairs(
    ptr, rows, live, h, s_row, s_head, s_channel,
    PER_HEAD: tl.constexpr, STEP: tl.constexpr, TURNED: tl.constexpr, H: tl.constexpr,
    T: tl.constexpr, HB: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Entries ``[T, HB or 1, DP / 2]`` of a table for either channel of each pair."""
    HT: tl.constexpr = HB if PER_HEAD else 1
    if STEP == 2:
        one = _angle(ptr, rows, live, h, tl.arange(0, DP // 2), s_row, s_head, s_channel,
                     PER_HEAD, 1, TURNED // 2, H)  # fmt: skip
        other = one
    else:
        both = _angle(ptr, rows, live, h, tl.arange(0, DP), s_row, s_head, s_channel,
                      PER_HEAD, STEP, TURNED, H)  # fmt: skip
        one, other = tl.split(tl.reshape(both, (T, HT, DP // 2, 2)))
    return one, other


@triton.jit
def _normed(
    x, mean, inverse, w_ptr, b_ptr, h, d,
    NORM: tl.constexpr, ACROSS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    if NORM == _LAYER:
        x = x - mean
    x = x * inverse
    if w_ptr is not None:
        x = x * _weight(w_ptr, h, d, ACROSS, H, D)
    if b_ptr is not None:
        x = x + _weight(b_ptr, h, d, ACROSS, H, D)
    return x


@triton.jit
def _statistics(x, inside, eps, NORM: tl.constexpr, D: tl.constexpr):
    """Mean and factor ``[T, HB, 1]`` of a norm within heads."""
    mean = tl.zeros_like(tl.sum(x, axis=2))[:, :, None]
    if NORM == _LAYER:
        mean = tl.sum(x, axis=2)[:, :, None] / D
        x = tl.where(inside, x - mean, 0.0)
    return mean, _inverse(tl.sum(x * x, axis=2)[:, :, None], D, eps, NORM)


@triton.jit
def _statistics_across(
    ptr, tokens, live, stride, eps,
    NORM: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    T: tl.constexpr, HB: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Mean and factor ``[T, 1, 1]`` of a norm over all heads."""
    d = tl.arange(0, DP)
    mean = tl.zeros((T,), tl.float32)
    if NORM == _LAYER:
        for first in range(0, H, HB):
            x = _at(ptr, tokens, live, first + tl.arange(0, HB), d, stride, H, D)
            mean += tl.sum(tl.sum(x, axis=2), axis=1)
        mean = mean / (H * D)
    total = tl.zeros((T,), tl.float32)
    for first in range(0, H, HB):
        h = first + tl.arange(0, HB)
        x = _at(ptr, tokens, live, h, d, stride, H, D)
        if NORM == _LAYER:
            inside = (h < H)[None, :, None] & (d < D)[None, None, :]
            x = tl.where(inside, x - mean[:, None, None], 0.0)
        total += tl.sum(tl.sum(x * x, axis=2), axis=1)
    return mean[:, None, None], _inverse(total, H * D, eps, NORM)[:, None, None]


@triton.jit
def _partner(d, WIDTH: tl.constexpr):
    """The other channel of a pair, and whether this one is the first."""
    first = (d % WIDTH) < WIDTH // 2
    return tl.where(first, d + WIDTH // 2, d - WIDTH // 2), first


@triton.jit
def _tokens(block, length, start, JOINT: tl.constexpr, T: tl.constexpr):
    """Positions of a program's tokens in their stream, which exist, and their rows of a table."""
    tokens = (block * T + tl.arange(0, T)).to(tl.int64)
    rows = tokens + start if JOINT else tokens
    return tokens, tokens < length, rows


@triton.jit
def _stream(
    x_ptr, stride, o_ptr, w_ptr, b_ptr, cos_ptr, sin_ptr, block, length, start,
    s_row, s_head, s_channel, eps,
    H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    TURN: tl.constexpr, JOINT: tl.constexpr, PER_HEAD: tl.constexpr,
    WIDTH: tl.constexpr, TURNED: tl.constexpr, STEP: tl.constexpr,
    T: tl.constexpr, HB: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """A few tokens of one stream, all heads."""
    wide, live, rows = _tokens(block, length, start, JOINT, T)
    d = tl.arange(0, DP)
    if NORM != _NONE and ACROSS:
        mean, inverse = _statistics_across(x_ptr, wide, live, stride, eps, NORM, H, D, T, HB, DP)
    for first in range(0, H, HB):
        h = first + tl.arange(0, HB)
        inside = live[:, None, None] & (h < H)[None, :, None] & (d < D)[None, None, :]
        x = _at(x_ptr, wide, live, h, d, stride, H, D)
        if NORM == _NONE:
            y = x
        else:
            if not ACROSS:
                mean, inverse = _statistics(x, inside, eps, NORM, D)
            y = _normed(x, mean, inverse, w_ptr, b_ptr, h, d, NORM, ACROSS, H, D)
        if TURN:
            if WIDTH == 2:
                real, imag = tl.split(tl.reshape(y, (T, HB, DP // 2, 2)))
                cos_r, cos_i = _of_pairs(cos_ptr, rows, live, h, s_row, s_head, s_channel,
                                         PER_HEAD, STEP, TURNED, H, T, HB, DP)  # fmt: skip
                sin_r, sin_i = _of_pairs(sin_ptr, rows, live, h, s_row, s_head, s_channel,
                                         PER_HEAD, STEP, TURNED, H, T, HB, DP)  # fmt: skip
                turned = tl.reshape(
                    tl.join(real * cos_r - imag * sin_r, imag * cos_i + real * sin_i),
                    (T, HB, DP),
                )
            else:
                cos = _angle(cos_ptr, rows, live, h, d, s_row, s_head, s_channel,
                             PER_HEAD, STEP, TURNED, H)  # fmt: skip
                sin = _angle(sin_ptr, rows, live, h, d, s_row, s_head, s_channel,
                             PER_HEAD, STEP, TURNED, H)  # fmt: skip
                p, is_first = _partner(d, WIDTH)
                other = _at(x_ptr, wide, live, h, p, stride, H, D)
                if NORM != _NONE:
                    other = _normed(other, mean, inverse, w_ptr, b_ptr, h, p, NORM, ACROSS, H, D)
                turned = y * cos + tl.where(is_first[None, None, :], -other, other) * sin
            y = tl.where((d < TURNED)[None, None, :], turned, y) if TURNED < D else turned
        places = (wide + start)[:, None, None] * (H * D) + h[None, :, None] * D + d[None, None, :]
        tl.store(o_ptr + places, y.to(o_ptr.dtype.element_ty), mask=inside)


@Launcher
@triton.jit
def _forward(
    x0, x1, o, w0, b0, w1, b1, cos, sin,
    length0, length1, row0, stride0, row1, stride1,
    s_batch, s_row, s_head, s_channel, eps0, eps1,
    H: tl.constexpr, D: tl.constexpr, NORM0: tl.constexpr, NORM1: tl.constexpr,
    ACROSS: tl.constexpr, TURN0: tl.constexpr, TURN1: tl.constexpr, JOINT: tl.constexpr,
    PER_HEAD: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr, STEP: tl.constexpr,
    T: tl.constexpr, HB: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks0 = tl.cdiv(length0, T)
    o = o + batch * (length0 + length1) * H * D
    if TURN0 or TURN1:
        cos = cos + batch * s_batch
        sin = sin + batch * s_batch
    if block < blocks0:
        _stream(x0 + batch * row0, stride0, o, w0, b0, cos, sin, block, length0, 0,
                s_row, s_head, s_channel, eps0, H, D, NORM0, ACROSS, TURN0, JOINT, PER_HEAD,
                WIDTH, TURNED, STEP, T, HB, DP)  # fmt: skip
    elif x1 is not None:
        _stream(x1 + batch * row1, stride1, o, w1, b1, cos, sin, block - blocks0, length1,
                length0, s_row, s_head, s_channel, eps1, H, D, NORM1, ACROSS, TURN1, JOINT,
                PER_HEAD, WIDTH, TURNED, STEP, T, HB, DP)  # fmt: skip


@triton.jit
def _unturned(
    g_ptr, wide, live, h, d, g_token, g_head, cos_ptr, sin_ptr, rows, start,
    s_row, s_head, s_channel,
    TURN: tl.constexpr, PER_HEAD: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr,
    STEP: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The gradient ``[T, HB, DP]`` turned back."""
    heads = live[:, None, None] & (h < H)[None, :, None]
    base = (wide + start)[:, None, None] * g_token + h[None, :, None] * g_head
    g = tl.load(g_ptr + base + d[None, None, :], mask=heads & (d < D)[None, None, :], other=0.0)
    g = g.to(tl.float32)
    if TURN:
        g = _turned_back(g, g_ptr + base, heads, live, h, d, cos_ptr, sin_ptr, rows, s_row, s_head,
                         s_channel, PER_HEAD, WIDTH, TURNED, STEP, H, D)  # fmt: skip
    return g


@triton.jit
def _turned_back(
    g, base, heads, live, h, d, cos_ptr, sin_ptr, rows, s_row, s_head, s_channel,
    PER_HEAD: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr, STEP: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    p, is_first = _partner(d, WIDTH)
    paired = (p >= 0) & (p < TURNED)
    other = tl.load(base + p[None, None, :], mask=heads & paired[None, None, :], other=0.0)
    other = other.to(tl.float32)
    cos = _angle(cos_ptr, rows, live, h, d, s_row, s_head, s_channel, PER_HEAD, STEP, TURNED, H)
    sin = _angle(sin_ptr, rows, live, h, p, s_row, s_head, s_channel, PER_HEAD, STEP, TURNED, H)
    turned = g * cos + tl.where(is_first[None, None, :], other, -other) * sin
    return tl.where((d < TURNED)[None, None, :], turned, g) if TURNED < D else turned


@triton.jit
def _stream_back(
    g_ptr, g_token, g_head, x_ptr, stride, dx_ptr, w_ptr, dw_ptr, db_ptr, cos_ptr, sin_ptr,
    block, length, start, s_row, s_head, s_channel, eps,
    H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    TURN: tl.constexpr, JOINT: tl.constexpr, PER_HEAD: tl.constexpr,
    WIDTH: tl.constexpr, TURNED: tl.constexpr, STEP: tl.constexpr,
    T: tl.constexpr, HB: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    wide, live, rows = _tokens(block, length, start, JOINT, T)
    d = tl.arange(0, DP)
    if NORM != _NONE and ACROSS:
        mean, inverse = _statistics_across(x_ptr, wide, live, stride, eps, NORM, H, D, T, HB, DP)
        along = tl.zeros((T,), tl.float32)
        level = tl.zeros((T,), tl.float32)
        for first in range(0, H, HB):
            h = first + tl.arange(0, HB)
            inside = live[:, None, None] & (h < H)[None, :, None] & (d < D)[None, None, :]
            u = _unturned(g_ptr, wide, live, h, d, g_token, g_head, cos_ptr, sin_ptr, rows, start,
                          s_row, s_head, s_channel, TURN, PER_HEAD, WIDTH, TURNED, STEP, H,
                          D)  # fmt: skip
            x = _at(x_ptr, wide, live, h, d, stride, H, D)
            x = tl.where(inside, (x - mean) * inverse, 0.0)
            if w_ptr is not None:
                u = u * _weight(w_ptr, h, d, ACROSS, H, D)
            along += tl.sum(tl.sum(u * x, axis=2), axis=1)
            level += tl.sum(tl.sum(u, axis=2), axis=1)
        share = 1.0 if NORM == _L2 else 1.0 / (H * D)
        along, level = along[:, None, None] * share, level[:, None, None] * share
    if not ACROSS:
        dw = tl.zeros((DP,), tl.float32)
        db = tl.zeros((DP,), tl.float32)
    for first in range(0, H, HB):
        h = first + tl.arange(0, HB)
        inside = live[:, None, None] & (h < H)[None, :, None] & (d < D)[None, None, :]
        g = _unturned(g_ptr, wide, live, h, d, g_token, g_head, cos_ptr, sin_ptr, rows, start,
                      s_row, s_head, s_channel, TURN, PER_HEAD, WIDTH, TURNED, STEP, H,
                      D)  # fmt: skip
        if NORM != _NONE:
            x = _at(x_ptr, wide, live, h, d, stride, H, D)
            if not ACROSS:
                mean, inverse = _statistics(x, inside, eps, NORM, D)
            x = tl.where(inside, (x - mean) * inverse, 0.0)
            if dw_ptr is not None:
                if ACROSS:
                    places = h[:, None] * D + d[None, :]
                    kept = (h < H)[:, None] & (d < D)[None, :]
                    tl.store(dw_ptr + places, tl.sum(g * x, axis=0), mask=kept)
                else:
                    dw += tl.sum(tl.sum(g * x, axis=1), axis=0)
            if db_ptr is not None:
                if ACROSS:
                    places = h[:, None] * D + d[None, :]
                    kept = (h < H)[:, None] & (d < D)[None, :]
                    tl.store(db_ptr + places, tl.sum(g, axis=0), mask=kept)
                else:
                    db += tl.sum(tl.sum(g, axis=1), axis=0)
            if w_ptr is not None:
                g = g * _weight(w_ptr, h, d, ACROSS, H, D)
            if not ACROSS:
                share = 1.0 if NORM == _L2 else 1.0 / D
                along = tl.sum(g * x, axis=2)[:, :, None] * share
                level = tl.sum(g, axis=2)[:, :, None] * share
            if NORM == _L2:
                # At its guard the norm divides by a constant.
                along = tl.where(inverse < 1.0 / eps, along, 0.0)
            g = g - x * along
            if NORM == _LAYER:
                g = g - level
            g = g * inverse
        places = wide[:, None, None] * (H * D) + h[None, :, None] * D + d[None, None, :]
        tl.store(dx_ptr + places, g.to(dx_ptr.dtype.element_ty), mask=inside)
    if NORM != _NONE and not ACROSS:
        if dw_ptr is not None:
            tl.store(dw_ptr + d, dw, mask=d < D)
        if db_ptr is not None:
            tl.store(db_ptr + d, db, mask=d < D)


@Launcher
@triton.jit
def _backward(
    g, x0, x1, dx0, dx1, w0, dw0, db0, w1, dw1, db1, cos, sin,
    length0, length1, g_batch, g_token, g_head, row0, stride0, row1, stride1,
    s_batch, s_row, s_head, s_channel, eps0, eps1,
    H: tl.constexpr, D: tl.constexpr, NORM0: tl.constexpr, NORM1: tl.constexpr,
    ACROSS: tl.constexpr, TURN0: tl.constexpr, TURN1: tl.constexpr, JOINT: tl.constexpr,
    PER_HEAD: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr, STEP: tl.constexpr,
    T: tl.constexpr, HB: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks0, blocks1 = tl.cdiv(length0, T), tl.cdiv(length1, T)
    g = g + batch * g_batch
    if TURN0 or TURN1:
        cos = cos + batch * s_batch
        sin = sin + batch * s_batch
    WEIGHTS: tl.constexpr = H * D if ACROSS else D
    if block < blocks0:
        part = (batch * blocks0 + block) * WEIGHTS
        _stream_back(
            g, g_token, g_head, x0 + batch * row0, stride0, dx0 + batch * length0 * H * D,
            w0, None if dw0 is None else dw0 + part, None if db0 is None else db0 + part,
            cos, sin, block, length0, 0, s_row, s_head, s_channel, eps0,
            H, D, NORM0, ACROSS, TURN0, JOINT, PER_HEAD, WIDTH, TURNED, STEP, T, HB, DP,
        )  # fmt: skip
    elif x1 is not None:
        block -= blocks0
        part = (batch * blocks1 + block) * WEIGHTS
        _stream_back(
            g, g_token, g_head, x1 + batch * row1, stride1, dx1 + batch * length1 * H * D,
            w1, None if dw1 is None else dw1 + part, None if db1 is None else db1 + part,
            cos, sin, block, length1, length0, s_row, s_head, s_channel, eps1,
            H, D, NORM1, ACROSS, TURN1, JOINT, PER_HEAD, WIDTH, TURNED, STEP, T, HB, DP,
        )  # fmt: skip


def lay(
    x: Tensor,
    then: Tensor | None,
    how: Lay,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None,) * 4,
    table: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Norms, rotates and joins one of queries, keys and values.

    Args:
        x: The stream that comes first in the joint sequence, ``[B, S, H, D]``.
        then: The stream that comes after it, ``[B, T, H, D]``, or None.
        how: What is done to them.
        weights: Weight and bias of the first stream's norm, then of the second's.
        table: Cosines and sines ``[B|1, positions, H|1, turned / step]``.

    Returns:
        ``[B, S + T, H, D]``, contiguous, in the dtype of `x`.
    """
    cos, sin = table or (None, None)
    if is_compiling():
        return _TRACED(x, then, *weights, cos, sin, *how.plainly())
    if is_grad_enabled():
        return _Lay.apply(x, then, *weights, cos, sin, how)
    kind = (
        how, x.shape, x.stride(), x.dtype, x.get_device(),
        None if then is None else (then.shape, then.stride(), then.get_device()),
        *[None if w is None else (w.dtype, w.get_device()) for w in weights],
        None if cos is None else (cos.shape, cos.stride(), cos.dtype, cos.get_device()),
        None if sin is None else (sin.stride(), sin.dtype, sin.get_device()),
    )  # fmt: skip
    try:
        launch = _LAUNCHES[kind]
    except KeyError:
        launch = _LAUNCHES.keep(kind, _new_launch(x, then, how, (cos, sin)))
    if launch is None:
        return _launch(x, then, how, weights, (cos, sin))
    batch, tokens, heads, dim = x.shape
    o = x.new_empty(batch, tokens if then is None else tokens + then.shape[1], heads, dim)
    launch(x, then, o, *weights, cos, sin)
    return o


_LAUNCHES: Plans[Repeated | None] = Plans()


def _new_launch(
    x: Tensor, then: Tensor | None, how: Lay, table: tuple[Tensor | None, Tensor | None]
) -> Repeated | None:
    """The launch for calls of this kind; None where something has to be copied before it."""
    cos, sin, *steps = _angles(x, table)
    one, other, strides = _plain_streams(x, then)
    copies = one is not x or other is not then or cos is not table[0] or sin is not table[1]
    if copies or not (x.numel() or (then is not None and then.numel())):
        return None
    return Repeated(_forward, *_arguments(x, then, how, cos, (*strides, *steps)))


class _Lay(torch.autograd.Function):
    """The operator without its dispatch, which costs the CPU more than the launch."""

    @staticmethod
    def forward(x: Tensor, then: Tensor | None, *rest: Any) -> Tensor:
        *weights, cos, sin, how = rest
        return _launch(x, then, how, tuple(weights), (cos, sin))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.how = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, then, *weights, cos, sin = ctx.saved_tensors
        found = _launch_back(grad, x, then, ctx.how, tuple(weights), (cos, sin))
        return *_needed(found, ctx), None


def _needed(found: list[Tensor], ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradients that are asked for, and none for the table."""
    needed = ctx.needs_input_grad[:6]
    return (*(g if need else None for g, need in zip(found, needed, strict=True)), None, None)


def _how(ints: list[int], eps: list[float]) -> Lay:
    n0, n1, across, t0, t1, joint, width, turned, step = ints
    return Lay(
        (n0, n1), (eps[0], eps[1]), bool(across), (bool(t0), bool(t1)), bool(joint), width,
        turned, step,
    )  # fmt: skip


@operator("attnproc::lay")
def _operator(
    x: Tensor,
    then: Tensor | None,
    w0: Tensor | None,
    b0: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    how: list[int],
    eps: list[float],
) -> Tensor:
    run = wrap_triton(_forward)
    return _launch(x, then, _how(how, eps), (w0, b0, w1, b1), (cos, sin), run)


@operator("attnproc::lay_back")
def _operator_back(
    grad: Tensor,
    x: Tensor,
    then: Tensor | None,
    w0: Tensor | None,
    b0: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    how: list[int],
    eps: list[float],
) -> list[Tensor]:
    run = wrap_triton(_backward)
    return _launch_back(grad, x, then, _how(how, eps), (w0, b0, w1, b1), (cos, sin), run)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ints, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = torch.ops.attnproc.lay_back(grad, *tensors, ctx.ints, ctx.eps)
    return *_needed(found, ctx), None, None


_operator.register_autograd(_differentiate, setup_context=_keep)
# By itself, as compiled code checks each name on the way to it.
_TRACED = torch.ops.attnproc.lay.default


def _settings(x: Tensor, cos: Tensor | None, how: Lay) -> tuple[Any, ...]:
    per_head = cos is not None and bool(cos.shape[2] > 1)
    # Compiled code for any size is for one number of heads and channels.
    return _fixed(how, int(x.shape[2]), int(x.shape[3]), per_head)


@functools.lru_cache(maxsize=1024)
def _fixed(how: Lay, heads: int, dim: int, per_head: bool) -> tuple[Any, ...]:
    """Arguments of compilation: what is done, and the tile's tokens, heads and channels."""
    width = padded(dim)
    most = 1 << (heads - 1).bit_length()
    at_once = max(1, min(most, _HELD // width))
    tokens = 1 if how.across else max(1, min(_TOKENS, _HELD // (width * at_once)))
    return (
        heads, dim, *how.norms, how.across, *how.turns, how.joint, per_head,
        how.width, how.turned, how.step, tokens, at_once, width,
    )  # fmt: skip


def _blocks(length: int, more: int, fixed: tuple[Any, ...]) -> tuple[int, int]:
    """How many programs walk over each stream, given what `_fixed` gave."""
    *_, tokens, _, _ = fixed
    return -(-length // tokens), -(-more // tokens)


_NO_TABLE = (None, None, 0, 0, 0, 0)


def _angles(x: Tensor, table: tuple[Tensor | None, Tensor | None]) -> tuple[Any, ...]:
    """The table on the device of `x`, and its four strides."""
    cos, sin = table
    if cos is None or sin is None:
        return _NO_TABLE
    if cos.device != x.device:
        cos, sin = cos.to(x.device), sin.to(x.device)
    strides = cos.stride()
    if strides != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
        strides = cos.stride()
    return (cos, sin, *strides) if cos.shape[0] > 1 else (cos, sin, 0, *strides[1:])


def _launch(
    x: Tensor,
    then: Tensor | None,
    how: Lay,
    weights: tuple[Tensor | None, ...],
    table: tuple[Tensor | None, Tensor | None],
    run: Run = _forward,
) -> Tensor:
    batch, length, heads, dim = x.shape
    cos, sin, *steps = _angles(x, table)
    x, then, strides = _plain_streams(x, then)
    o = x.new_empty(batch, length + (0 if then is None else then.shape[1]), heads, dim)
    if o.numel():
        grid, numbers, fixed = _arguments(x, then, how, cos, (*strides, *steps))
        run(grid, (x, then, o, *weights, cos, sin), numbers, fixed)
    return o


def _arguments(
    x: Tensor, then: Tensor | None, how: Lay, cos: Tensor | None, strides: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int | float, ...], tuple[Any, ...]]:
    """Grid, numbers and arguments of compilation, given the strides of streams and table."""
    length, more = x.shape[1], 0 if then is None else then.shape[1]
    fixed = _settings(x, cos, how)
    grid = sum(_blocks(length, more, fixed)), x.shape[0]
    return grid, (length, more, *strides, *how.eps), fixed


def _launch_back(
    grad: Tensor,
    x: Tensor,
    then: Tensor | None,
    how: Lay,
    weights: tuple[Tensor | None, ...],
    table: tuple[Tensor | None, Tensor | None],
    run: Run = _backward,
) -> list[Tensor]:
    batch, length, heads, dim = x.shape
    cos, sin, *steps = _angles(x, table)
    x, then, strides = _plain_streams(x, then)
    more = 0 if then is None else then.shape[1]
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    fixed = _settings(x, cos, how)
    blocks = _blocks(length, more, fixed)
    dx = x.new_empty(x.shape)
    dthen = None if then is None else then.new_empty(then.shape)
    w0, b0, w1, b1 = weights
    dw0, db0, dw1, db1 = parts = [
        None if w is None else _room(w, batch * blocks[stream], how, heads, dim)
        for w, stream in ((w0, 0), (b0, 0), (w1, 1), (b1, 1))
    ]
    if grad.numel():
        run(
            (sum(blocks), batch),
            (grad, x, then, dx, dthen, w0, dw0, db0, w1, dw1, db1, cos, sin),
            (length, more, *grad.stride()[:3], *strides, *steps, *how.eps),
            fixed,
        )
    sums = [
        x.new_empty(0) if part is None or w is None else part.sum(0).view_as(w).to(w.dtype)
        for part, w in zip(parts, weights, strict=True)
    ]
    return [dx, x.new_empty(0) if dthen is None else dthen, *sums]


def _plain_streams(
    x: Tensor, then: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[int, int, int, int]]:
    """Both with each token's heads in one piece, and the strides to row and token of each."""
    x, row, token = _plain(x)
    if then is None:
        return x, None, (row, token, 0, 0)
    then, *others = _plain(then)
    return x, then, (row, token, *others)


def _plain(x: Tensor) -> tuple[Tensor, int, int]:
    """`x` ``[B, S, H, D]`` with each token's heads in one piece, and its strides to it."""
    row, token, head, one = x.stride()
    if one == 1 and head == x.shape[3]:
        return x, row, token
    x = x.contiguous()
    return x, *x.stride()[:2]


def _room(w: Tensor, programs: int, how: Lay, heads: int, dim: int) -> Tensor:
    """Room for what each program adds to the gradient of a weight."""
    return w.new_empty(programs, heads * dim if how.across else dim, dtype=torch.float32)
