"""Attention among few tokens, of which there are many rows: frames of a video at each place.

The plain form is `attnproc.kernels.reference`. A program holds all scores of one head, so queries,
keys and values are read once and nothing but the output is written, with float32 in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling

from .launch import Launcher, Plans, Repeated, operator, padded, wrap_triton

__all__ = ["attended"]

_PRECISION = tl.constexpr("tf32x3")
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(ptr, n, d, count, stride, D: tl.constexpr):
    """A tile of tokens, zeros outside."""
    inside = (n < count)[:, None] & (d < D)[None, :]
    return tl.load(ptr + n[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _attend(
    q, k, v, o, queries, keys, q_batch, q_head, q_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, QP: tl.constexpr,
    KP: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """All of one head."""
    # Compiled code may hand numbers over in double precision.
    scale = tl.cast(scale, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    m, n, d = tl.arange(0, QP), tl.arange(0, KP), tl.arange(0, DP)
    asked = _rows(q + batch * q_batch + head * q_head, m, d, queries, q_token, D)
    seen = _rows(k + batch * k_batch + head // G * k_head, n, d, keys, k_token, D)
    values = _rows(v + batch * v_batch + head // G * v_head, n, d, keys, v_token, D)
    scores = tl.dot(asked, tl.trans(seen), input_precision=_PRECISION) * (scale * _LOG2E)
    live = (n < keys)[None, :]
    if CAUSAL:
        live = live & (n[None, :] <= m[:, None])
    scores = tl.where(live, scores, float("-inf"))
    shares = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    sums = tl.sum(shares, axis=1)
    found = tl.dot(shares.to(values.dtype), values, input_precision=_PRECISION) / sums[:, None]
    o = o + (batch * queries * H + head) * D
    inside = (m < queries)[:, None] & (d < D)[None, :]
    tl.store(o + m[:, None] * (H * D) + d[None, :], found.to(o.dtype.element_ty), mask=inside)


# By the warps of a program.
_ATTEND = {warps: Launcher(_attend, num_warps=warps) for warps in (1, 2, 4, 8)}


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention among few tokens; there are no gradients.

    Args:
        q: ``[B, H, Q, D]``, with Q and D small enough for a tile; channels without gaps, as in
            `k` and `v`.
        k: ``[B, H', K, D]`` with ``H'`` dividing ``H``; so is `v`.
        v: Values.
        causal: Whether query i sees keys 0 to i alone.
        scale: Factor of the scores; None is ``D ** -0.5``.

    Returns:
        ``[B, H, Q, D]`` in the dtype of `q`, whose tokens of all heads are rows in memory.
    """
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if is_compiling():
        return _TRACED(q, k, v, causal, factor).transpose(1, 2)
    kind = (
        q.shape, q.stride(), q.dtype, q.get_device(), k.shape, k.stride(), k.dtype,
        k.get_device(), v.stride(), v.dtype, v.get_device(), causal, factor,
    )  # fmt: skip
    try:
        launch = _LAUNCHES[kind]
    except KeyError:
        arguments = _arguments(q, k, v, causal, factor)
        launch = _LAUNCHES.keep(kind, Repeated(_launcher(arguments[2]), *arguments))
    o = _room(q)
    if o.numel():
        launch(q, k, v, o)
    return o.transpose(1, 2)


_LAUNCHES: Plans[Repeated] = Plans()


@operator("attnproc::short")
def _operator(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    o = _room(q)
    if o.numel():
        grid, numbers, fixed = _arguments(q, k, v, causal, scale)
        wrap_triton(_launcher(fixed))(grid, (q, k, v, o), numbers, fixed)
    return o


# By itself, as compiled code checks each name on the way to it.
_TRACED = torch.ops.attnproc.short.default


def _launcher(fixed: tuple[int, ...]) -> Launcher:
    """The kernel with as many warps as its tiles keep busy: elements of scores by channels."""
    _, _, _, channels, queries, keys, _ = fixed
    return _ATTEND[max(1, min(8, channels * queries * keys >> 16))]


def _room(q: Tensor) -> Tensor:
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, factor: float
) -> tuple[tuple[int, int], tuple[int | float, ...], tuple[int, ...]]:
    """Grid, numbers and arguments of compilation."""
    batch, heads, queries, dim = q.shape
    keys, strides = k.shape[2], (s for x in (q, k, v) for s in x.stride()[:3])
    # Compiled code for any size is for one size of a head and few sizes of a tile.
    heads, group, dim = int(heads), int(heads) // int(k.shape[1]), int(dim)
    tiles = padded(dim), padded(int(queries)), padded(int(keys))
    return (
        (batch * heads, 1),
        (queries, keys, *strides, factor),
        (heads, group, dim, *tiles, int(causal)),
    )
