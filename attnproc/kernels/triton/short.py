"""Attention among few tokens, of which there are many rows: frames of a video at each place.

The plain form is `attnproc.kernels.reference`. A program holds all scores of one head, so queries,
keys and values are read once and nothing but the output is written, with float32 in between.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, is_grad_enabled
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from .launch import Launcher, Plans, Repeated, Run, operator, padded, wrap_triton

__all__ = ["attended"]

# Channels by queries by keys of the tiles, in bytes, below which one warp is enough, forward and
# backward: it has registers for no more.
_SMALL, _SMALL_BACK = 1 << 19, 1 << 18
_PRECISION = tl.constexpr("tf32x3")
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(ptr, n, d, count, stride, D: tl.constexpr):
    """A tile of tokens, zeros outside."""
    inside = (n < count)[:, None] & (d < D)[None, :]
    return tl.load(ptr + n[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _shares(q, k, m, n, keys, scale, CAUSAL: tl.constexpr):
    """Weights ``[QP, KP]`` that are still to be divided by their sums."""
    scores = tl.dot(q, tl.trans(k), input_precision=_PRECISION) * (scale * _LOG2E)
    live = (n < keys)[None, :]
    if CAUSAL:
        live = live & (n[None, :] <= m[:, None])
    scores = tl.where(live, scores, float("-inf"))
    shares = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return shares, tl.sum(shares, axis=1)


@Launcher
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
    shares, sums = _shares(asked, seen, m, n, keys, scale, CAUSAL)
    found = tl.dot(shares.to(values.dtype), values, input_precision=_PRECISION) / sums[:, None]
    o = o + (batch * queries * H + head) * D
    inside = (m < queries)[:, None] & (d < D)[None, :]
    tl.store(o + m[:, None] * (H * D) + d[None, :], found.to(o.dtype.element_ty), mask=inside)


@Launcher
@triton.jit
def _attend_back(
    g, q, k, v, dq, dk, dv, queries, keys, g_batch, g_head, g_token, q_batch, q_head, q_token,
    k_batch, k_head, k_token, v_batch, v_head, v_token, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, QP: tl.constexpr,
    KP: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """All of one head of keys, and of the heads of queries that see it."""
    scale = tl.cast(scale, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // (H // G), row % (H // G)
    m, n, d = tl.arange(0, QP), tl.arange(0, KP), tl.arange(0, DP)
    seen = _rows(k + batch * k_batch + head * k_head, n, d, keys, k_token, D)
    values = _rows(v + batch * v_batch + head * v_head, n, d, keys, v_token, D)
    of_keys = tl.zeros((KP, DP), tl.float32)
    of_values = tl.zeros((KP, DP), tl.float32)
    inside = (m < queries)[:, None] & (d < D)[None, :]
    for each in range(G):
        one = head * G + each
        asked = _rows(q + batch * q_batch + one * q_head, m, d, queries, q_token, D)
        given = _rows(g + batch * g_batch + one * g_head, m, d, queries, g_token, D)
        shares, sums = _shares(asked, seen, m, n, keys, scale, CAUSAL)
        shares = shares / sums[:, None]
        kept = shares.to(values.dtype)
        of_values = tl.dot(tl.trans(kept), given, of_values, input_precision=_PRECISION)
        of_shares = tl.dot(given, tl.trans(values), input_precision=_PRECISION)
        level = tl.sum(shares * of_shares, axis=1)[:, None]
        of_scores = (shares * (of_shares - level) * scale).to(values.dtype)
        of_keys = tl.dot(tl.trans(of_scores), asked, of_keys, input_precision=_PRECISION)
        of_queries = tl.dot(of_scores, seen, input_precision=_PRECISION)
        places = (batch * queries * H + one) * D + m[:, None] * (H * D) + d[None, :]
        tl.store(dq + places, of_queries.to(dq.dtype.element_ty), mask=inside)
    inside = (n < keys)[:, None] & (d < D)[None, :]
    places = (batch * keys * (H // G) + head) * D + n[:, None] * (H // G * D) + d[None, :]
    tl.store(dk + places, of_keys.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + places, of_values.to(dv.dtype.element_ty), mask=inside)


_attend_small = Launcher(_attend.fn, num_warps=1)
_attend_back_small = Launcher(_attend_back.fn, num_warps=1)


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention among few tokens.

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
    if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attended.apply(q, k, v, causal, factor).transpose(1, 2)
    kind = (
        q.shape, q.stride(), q.dtype, q.get_device(), k.shape, k.stride(), k.dtype,
        k.get_device(), v.stride(), v.dtype, v.get_device(), causal, factor,
    )  # fmt: skip
    try:
        launch = _LAUNCHES[kind]
    except KeyError:
        launcher = _attend_small if _is_small(q, k) else _attend
        arguments = _arguments(q, k, v, causal, factor)
        launch = _LAUNCHES.keep(kind, Repeated(launcher, *arguments))
    o = _room(q)
    if o.numel():
        launch(q, k, v, o)
    return o.transpose(1, 2)


_LAUNCHES: Plans[Repeated] = Plans()


class _Attended(torch.autograd.Function):
    """The operator without its dispatch, which costs the CPU more than the launch."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        return _forward(q, k, v, causal, scale, _attend_small if _is_small(q, k) else _attend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        run = _attend_back_small if _is_small(q, k, _SMALL_BACK) else _attend_back
        found = _backward(grad, q, k, v, ctx.causal, ctx.scale, run)
        return *(t.transpose(1, 2) for t in found), None, None


@operator("attnproc::short")
def _operator(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    run = wrap_triton(_attend_small) if _is_small(q, k) else wrap_triton(_attend)
    return _forward(q, k, v, causal, scale, run)


@operator("attnproc::short_back")
def _operator_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> list[Tensor]:
    small = _is_small(q, k, _SMALL_BACK)
    run = wrap_triton(_attend_back_small) if small else wrap_triton(_attend_back)
    return _backward(grad, q, k, v, causal, scale, run)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = torch.ops.attnproc.short_back(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *(t.transpose(1, 2) for t in found), None, None


_operator.register_autograd(_differentiate, setup_context=_keep)
# By itself, as compiled code checks each name on the way to it.
_TRACED = torch.ops.attnproc.short.default


def _is_small(q: Tensor, k: Tensor, most: int = _SMALL) -> bool:
    _, _, _, channels, queries, keys, _ = _fixed(q, k, False)
    return channels * queries * keys * q.element_size() < most


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, run: Run) -> Tensor:
    o = _room(q)
    if o.numel():
        grid, numbers, fixed = _arguments(q, k, v, causal, scale)
        run(grid, (q, k, v, o), numbers, fixed)
    return o


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    run: Run,
) -> list[Tensor]:
    """Gradients ``[B, S, H, D]`` of queries, keys and values, given the output's."""
    grad = grad.transpose(1, 2)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    dq, dk, dv = found = [_room(t) for t in (q, k, v)]
    if q.numel():
        (programs, one), numbers, fixed = _arguments(q, k, v, causal, scale)
        queries, keys, *others = numbers
        numbers = queries, keys, *grad.stride()[:3], *others
        # A program a head of keys.
        grid = programs // fixed[1], one
        run(grid, (grad, q, k, v, dq, dk, dv), numbers, fixed)
    return found


def _room(q: Tensor) -> Tensor:
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, factor: float
) -> tuple[tuple[int, int], tuple[int | float, ...], tuple[int, ...]]:
    """Grid, numbers and arguments of compilation."""
    batch, heads, queries, _ = q.shape
    strides = (s for x in (q, k, v) for s in x.stride()[:3])
    numbers = (queries, k.shape[2], *strides, factor)
    return (batch * heads, 1), numbers, _fixed(q, k, causal)


def _fixed(q: Tensor, k: Tensor, causal: bool) -> tuple[int, ...]:
    """Arguments of compilation: heads, those that share keys, channels, and sizes of tiles."""
    # Compiled code for any size is for one size of a head and few sizes of a tile.
    heads, queries, dim = (int(size) for size in q.shape[1:])
    tiles = padded(dim), padded(queries), padded(int(k.shape[2]))
    return heads, heads // int(k.shape[1]), dim, *tiles, int(causal)
