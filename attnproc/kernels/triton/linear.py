"""Linear attention of ReLU features in two passes over q, k and v, with float32 between them.

The plain form is `attnproc.kernels.linear.relu_linear`. The first pass sums ``relu(k)^T v`` and
``relu(k)`` over the tokens, the second applies the sums to the queries. No wide copy is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, is_grad_enabled
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from .launch import Launcher, Run, operator, padded, wrap_triton

__all__ = ["linear_attention"]

# Tokens of a tile, those that a program of the applying passes walks over, and the least for one
# of the summing passes.
_TILE = 64
_STEP = 256
_WALK = 512
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _rows(ptr, tokens, live, d, stride, D: tl.constexpr):
    """A tile ``[T, DP]``, zeros outside."""
    inside = live[:, None] & (d < D)[None, :]
    return tl.load(ptr + tokens[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _head(ptr, row, heads, batch_stride, head_stride):
    """Where the tokens of a program's head begin."""
    return ptr + (row // heads) * batch_stride + (row % heads) * head_stride


@triton.jit
def _whole_head(ptr, row, heads, length, D: tl.constexpr):
    """The same of a contiguous ``[B, S, H, D]``."""
    return ptr + ((row // heads) * length * heads + row % heads) * D


@Launcher
@triton.jit
def _sums(
    k, v, state, total, length, heads, k_batch, k_head, k_token, v_batch, v_head, v_token,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Part of ``relu(k)^T v`` ``[D, D]`` and of ``relu(k)`` ``[D]``: some tokens of one head."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = _head(k, row, heads, k_batch, k_head)
    v = _head(v, row, heads, v_batch, v_head)
    d = tl.arange(0, DP)
    products = tl.zeros((DP, DP), tl.float32)
    sums = tl.zeros((DP,), tl.float32)
    for first in range(0, WALK, T):
        tokens = (part * WALK + first + tl.arange(0, T)).to(tl.int64)
        live = tokens < length
        keys = _rows(k, tokens, live, d, k_token, D)
        values = _rows(v, tokens, live, d, v_token, D)
        keys = tl.where(keys > 0, keys, 0.0).to(values.dtype)
        products = tl.dot(tl.trans(keys), values, products, input_precision=_PRECISION)
        sums += tl.sum(keys.to(tl.float32), axis=0)
    at = (part * tl.num_programs(0) + row) * D
    inside = (d < D)[:, None] & (d < D)[None, :]
    tl.store(state + at * D + d[:, None] * D + d[None, :], products, mask=inside)
    tl.store(total + at + d, sums, mask=d < D)


# One warp holds a small matrix, and many programs hide each other's waiting.
_sums_small = Launcher(_sums.fn, num_warps=1)
_SMALL = 32


@triton.jit
def _summed(
    state, total, row, count, d, parts, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """The whole state ``[DP, DP]`` and normaliser ``[DP]`` of one head."""
    inside = (d < D)[:, None] & (d < D)[None, :]
    whole = tl.zeros((DP, DP), tl.float32)
    sums = tl.zeros((DP,), tl.float32)
    for part in range(parts):
        at = (part * count + row) * D
        whole += tl.load(state + at * D + d[:, None] * D + d[None, :], mask=inside, other=0.0)
        sums += tl.load(total + at + d, mask=d < D, other=0.0)
    return whole, sums


@Launcher
@triton.jit
def _apply(
    q, state, total, o, length, heads, parts, eps, q_batch, q_head, q_token,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Outputs of some tokens of one head."""
    # Compiled code may hand numbers over in double precision.
    eps = tl.cast(eps, tl.float32)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    whole, sums = _summed(state, total, row, tl.num_programs(0), d, parts, D, DP)
    # Three numbers of 8 bits each are one of 24: products with bfloat16 are exact as they are.
    high = whole.to(tl.bfloat16)
    rest = whole - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    q = _head(q, row, heads, q_batch, q_head)
    o = _whole_head(o, row, heads, length, D)
    for first in range(0, WALK, T):
        tokens = (part * WALK + first + tl.arange(0, T)).to(tl.int64)
        live = tokens < length
        raw = _rows(q, tokens, live, d, q_token, D)
        queries = tl.maximum(raw.to(tl.float32), 0.0)
        norm = tl.sum(queries * sums[None, :], axis=1) + eps
        if q.dtype.element_ty == tl.bfloat16:
            narrow = queries.to(tl.bfloat16)
            found = tl.dot(narrow, low)
            found = tl.dot(narrow, middle, found)
            found = tl.dot(narrow, high, found)
        else:
            found = tl.dot(queries, whole, input_precision=_PRECISION)
        found = found / norm[:, None]
        inside = live[:, None] & (d < D)[None, :]
        places = tokens[:, None] * (heads * D) + d[None, :]
        tl.store(o + places, found.to(o.dtype.element_ty), mask=inside)


@Launcher
@triton.jit
def _back_queries(
    g, q, o, state, total, dq, d_state, d_total, length, heads, parts, eps,
    g_batch, g_head, g_token, q_batch, q_head, q_token, o_batch, o_head, o_token,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Gradients of some queries of one head, and their part of the sums' gradients."""
    eps = tl.cast(eps, tl.float32)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    whole, sums = _summed(state, total, row, tl.num_programs(0), d, parts, D, DP)
    g = _head(g, row, heads, g_batch, g_head)
    q = _head(q, row, heads, q_batch, q_head)
    o = _head(o, row, heads, o_batch, o_head)
    dq = _whole_head(dq, row, heads, length, D)
    products = tl.zeros((DP, DP), tl.float32)
    shares = tl.zeros((DP,), tl.float32)
    for first in range(0, WALK, T):
        tokens = (part * WALK + first + tl.arange(0, T)).to(tl.int64)
        live = tokens < length
        inside = live[:, None] & (d < D)[None, :]
        raw = _rows(q, tokens, live, d, q_token, D).to(tl.float32)
        queries = tl.maximum(raw, 0.0)
        norm = tl.sum(queries * sums[None, :], axis=1) + eps
        grad = _rows(g, tokens, live, d, g_token, D).to(tl.float32) / norm[:, None]
        along = tl.sum(grad * _rows(o, tokens, live, d, o_token, D).to(tl.float32), axis=1)
        found = tl.dot(grad, tl.trans(whole), input_precision=_PRECISION)
        found -= along[:, None] * sums[None, :]
        found = tl.where(raw > 0, found, 0.0)
        places = tokens[:, None] * (heads * D) + d[None, :]
        tl.store(dq + places, found.to(dq.dtype.element_ty), mask=inside)
        queries = tl.where(inside, queries, 0.0)
        products = tl.dot(tl.trans(queries), grad, products, input_precision=_PRECISION)
        shares -= tl.sum(queries * along[:, None], axis=0)
    at = (part * tl.num_programs(0) + row) * D
    inside = (d < D)[:, None] & (d < D)[None, :]
    tl.store(d_state + at * D + d[:, None] * D + d[None, :], products, mask=inside)
    tl.store(d_total + at + d, shares, mask=d < D)


@Launcher
@triton.jit
def _back_keys(
    k, v, d_state, d_total, dk, dv, length, heads, parts,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys and values of one head."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    whole, sums = _summed(d_state, d_total, row, tl.num_programs(0), d, parts, D, DP)
    k = _head(k, row, heads, k_batch, k_head)
    v = _head(v, row, heads, v_batch, v_head)
    dk = _whole_head(dk, row, heads, length, D)
    dv = _whole_head(dv, row, heads, length, D)
    for first in range(0, WALK, T):
        tokens = (part * WALK + first + tl.arange(0, T)).to(tl.int64)
        live = tokens < length
        inside = live[:, None] & (d < D)[None, :]
        keys = _rows(k, tokens, live, d, k_token, D).to(tl.float32)
        values = _rows(v, tokens, live, d, v_token, D).to(tl.float32)
        of_keys = tl.dot(values, tl.trans(whole), input_precision=_PRECISION) + sums[None, :]
        of_keys = tl.where(keys > 0, of_keys, 0.0)
        of_values = tl.dot(tl.maximum(keys, 0.0), whole, input_precision=_PRECISION)
        places = tokens[:, None] * (heads * D) + d[None, :]
        tl.store(dk + places, of_keys.to(dk.dtype.element_ty), mask=inside)
        tl.store(dv + places, of_values.to(dv.dtype.element_ty), mask=inside)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """``relu(q) (relu(k)^T v) / (relu(q) sum(relu(k)) + eps)``.

    Args:
        q: ``[B, H, Q, D]``, D at most 128.
        k: ``[B, H, K, D]``, as `v`.
        v: Values.
        eps: Added to the normaliser.

    Returns:
        ``[B, H, Q, D]``, a view of a contiguous ``[B, Q, H, D]``.
    """
    if is_compiling():
        o = _TRACED(q, k, v, eps)[0]
    elif is_grad_enabled():
        o = _Linear.apply(q, k, v, eps)[0]
    else:
        o = _forward(q, k, v, eps)[0]
    return o.transpose(1, 2)


class _Linear(torch.autograd.Function):
    """The operator without its dispatch, which costs the CPU more than the launches."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, ...]:
        return tuple(_forward(q, k, v, eps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _keep(ctx, inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        found = _backward(grad, *ctx.saved_tensors, ctx.eps)
        return *(g.transpose(1, 2) for g in found), None


@operator("attnproc::relu_linear")
def _operator(q: Tensor, k: Tensor, v: Tensor, eps: float) -> list[Tensor]:
    sums = wrap_triton(_sums_small) if q.shape[3] <= _SMALL else wrap_triton(_sums)
    return _forward(q, k, v, eps, (sums, wrap_triton(_apply)))


@operator("attnproc::relu_linear_back")
def _operator_back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    state: Tensor,
    total: Tensor,
    eps: float,
) -> list[Tensor]:
    runs = wrap_triton(_back_queries), wrap_triton(_back_keys)
    return _backward(grad, q, k, v, o, state, total, eps, runs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    q, k, v, ctx.eps = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    q, k, v, o, state, total = ctx.saved_tensors
    found = torch.ops.attnproc.relu_linear_back(grads[0], q, k, v, o, state, total, ctx.eps)
    return (*(g.transpose(1, 2) for g in found), None)


_operator.register_autograd(_differentiate, setup_context=_keep)
# By itself, as compiled code checks each name on the way to it.
_TRACED = torch.ops.attnproc.relu_linear.default


def _plain(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _split(tokens: int) -> tuple[int, int]:
    """Tokens that a program walks over, and how many programs that makes a head."""
    walk = max(_WALK, -(-tokens // 16 // _TILE) * _TILE)
    return walk, -(-tokens // walk)


def _tile(dim: int) -> tuple[int, int, int]:
    """Channels, their power of two, and the tokens of a tile."""
    return dim, padded(dim), _TILE


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float,
    runs: tuple[Run, Run] | None = None,
) -> list[Tensor]:
    q, k, v = _plain(q), _plain(k), _plain(v)
    batch, heads, queries, dim = q.shape
    keys, rows = k.shape[2], batch * heads
    walk, parts = _split(keys)
    state = q.new_empty(parts, rows, dim, dim, dtype=torch.float32)
    total = q.new_empty(parts, rows, dim, dtype=torch.float32)
    o = q.new_empty(batch, queries, heads, dim)
    if not o.numel():
        return [o, state, total]
    tile = _tile(int(dim))
    sums, apply = runs or (_sums_small if dim <= _SMALL else _sums, _apply)
    sums(
        (rows, parts),
        (k, v, state, total),
        (keys, heads, *k.stride()[:3], *v.stride()[:3]),
        (*tile, walk),
    )
    apply(
        (rows, -(-queries // _STEP)),
        (q, state, total, o),
        (queries, heads, parts, eps, *q.stride()[:3]),
        (*tile, _STEP),
    )
    return [o, state, total]


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    state: Tensor,
    total: Tensor,
    eps: float,
    runs: tuple[Run, Run] = (_back_queries, _back_keys),
) -> list[Tensor]:
    back_queries, back_keys = runs
    q, k, v, grad, o = (_plain(t) for t in (q, k, v, grad.transpose(1, 2), o.transpose(1, 2)))
    batch, heads, queries, dim = q.shape
    keys, rows = k.shape[2], batch * heads
    walk, parts = _split(queries)
    dq = q.new_empty(batch, queries, heads, dim)
    dk, dv = (t.new_empty(batch, keys, heads, dim) for t in (k, v))
    d_state = state.new_empty(parts, rows, dim, dim)
    d_total = state.new_empty(parts, rows, dim)
    if not q.numel():
        return [dq, dk.zero_(), dv.zero_()]
    tile = _tile(int(dim))
    strides = (*grad.stride()[:3], *q.stride()[:3], *o.stride()[:3])
    back_queries(
        (rows, parts),
        (grad, q, o, state, total, dq, d_state, d_total),
        (queries, heads, state.shape[0], eps, *strides),
        (*tile, walk),
    )
    back_keys(
        (rows, -(-keys // _STEP)),
        (k, v, d_state, d_total, dk, dv),
        (keys, heads, parts, *k.stride()[:3], *v.stride()[:3]),
        (*tile, _STEP),
    )
    return [dq, dk, dv]
