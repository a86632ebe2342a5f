"""Ring attention: keys and values travel round the ranks, each of which keeps its queries.

A rank never holds the keys of more than two, forward or backward. Source:
https://arxiv.org/abs/2310.01889
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import CHUNKED, Kernel, triton
from ..kernels.chunked import chunked_backward
from ..kernels.fusing import fusable
from ..kernels.reference import expand_heads, numbered
from ..kernels.takes import HALF
from ..types import Scoring
from .copies import Route, route
from .exchange import Axis, Coming, post

__all__ = ["Local", "Ring", "local_of", "merged"]


class Local(NamedTuple):
    """Attention to the keys that a rank holds just now."""

    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Any, ...]]
    """(q, k, v, scale) -> output, log-sum-exp and whatever else `backward` wants."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(gradient, q, k, v, output, log-sum-exp, scale, rest) -> gradients of q, k, v.

    Output and log-sum-exp are those of all keys, so the gradients are this part's of the whole.
    """


@dataclass(frozen=True)
class Ring:
    """A kernel round a ring, for calls without a mask.

    Args:
        axis: The ranks.
        local: What runs on each rank.
        wide: Whether outputs are summed up in float32, in place of the queries' dtype.
    """

    axis: Axis
    local: Local
    wide: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention of own queries ``[B, H, S, D]`` to the keys ``[B, H', S, D]`` of all ranks.

        Raises:
            Lost: Another rank ended, or did not answer in time.
        """
        q, scale = numbered(q, scoring)
        return _Ring.apply(q, k, v, scale, self.axis, self.local, self.wide)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        axis: Axis,
        local: Local,
        wide: bool,
    ) -> Tensor:
        rows, way = _rows(axis, k, v)
        total = torch.promote_types(q.dtype, torch.float32)
        summing = total if wide else q.dtype
        o = lse = rest = None
        for step in range(axis.size):
            last = step == axis.size - 1
            # Sent on before it is used, so that the next keys come while these are at work.
            waiting = [] if last else [_pass_on(row, axis, way) for row in rows]
            some, of_some, *rest = local.forward(q, *_views(rows, k, v), scale)
            of_some = of_some.to(total)
            if o is None or lse is None:
                o, lse = some, of_some
            else:
                o, lse = merged(o, lse, some, of_some, summing, q.dtype if last else summing)
            rows = [coming.wait() for coming in waiting]
        assert o is not None
        assert lse is not None
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.axis, ctx.local, ctx.rest = scale, axis, local, rest
        return o

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, do: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        axis: Axis = ctx.axis
        of_k = _by_token(k, v)
        summing = torch.promote_types(q.dtype, torch.float32)
        (do,) = _by_token(do)
        dq = torch.zeros_like(q, dtype=summing)
        grads = [torch.zeros_like(t, dtype=summing) for t in of_k]
        for step in range(axis.size):
            rows = [] if step == axis.size - 1 else [_row(t) for t in of_k]
            waiting = [_pass_on(row, axis) for row in rows]
            of_q, *found = ctx.local.backward(do, q, *of_k, o, lse, ctx.scale, ctx.rest)
            dq += of_q
            for grad, more in zip(grads, found, strict=True):
                grad += more
            # The gradients follow their keys, and are home after one more step.
            home = [_pass_on(_row(t), axis) for t in grads]
            grads = _views([coming.wait() for coming in home], k, v)
            of_k = _views([coming.wait() for coming in waiting], k, v) if waiting else of_k
        dk, dv = grads
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def merged(
    o: Tensor,
    lse: Tensor,
    some: Tensor,
    of_some: Tensor,
    summing: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the keys of two parts, of which the first one is used up.

    Args:
        o: The output of the first part ``[B, H, S, D]``.
        lse: Its log-sum-exp ``[B, H, S]``.
        some: The output of the second part.
        of_some: Its log-sum-exp.
        summing: What is summed in.
        dtype: Of the sum.
    """
    if fusable(o) and lse.dtype == torch.float32 and not torch.compiler.is_compiling():
        return triton.merge.merge(o, lse, some, of_some, dtype)
    # The share of the new part, by which the sum moves towards it.
    share = torch.sigmoid(of_some - lse)[..., None].to(summing)
    o = o.to(summing).lerp_(some.to(summing), share)
    return o.to(dtype), torch.logaddexp(lse, of_some)


def _by_token(*tensors: Tensor) -> list[Tensor]:
    """``[B, H, S, D]`` that lie in memory as ``[B, S, H, D]``."""
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]


def _row(t: Tensor) -> Tensor:
    """The numbers of a tensor of `_by_token` as they lie in memory."""
    return t.transpose(1, 2).reshape(-1)


def _rows(axis: Axis, k: Tensor, v: Tensor) -> tuple[list[Tensor], Route | None]:
    """Own keys and values as what travels: a row of each, or one of both that copies carry."""
    total = k.numel() + v.numel()
    if k.dtype == v.dtype:
        way = route(axis, partial(_sent, axis.size, total), k)
        if way is not None:
            row = way.row(total, k.dtype)
            for room, t in zip(_views([row], k, v), (k, v), strict=True):
                room.copy_(t)
            return [row], way
    return [_row(t) for t in _by_token(k, v)], None


def _sent(ranks: int, count: int, one: int, other: int) -> int:
    """How many numbers a rank has for another one, with so many that travel."""
    return count if other == (one + 1) % ranks else 0


def _views(rows: Sequence[Tensor], k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values of rows, shaped as own ones."""
    parts = rows if len(rows) == 2 else rows[0].split([k.numel(), v.numel()])
    shapes = [t.transpose(1, 2).shape for t in (k, v)]
    return [part.view(shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _pass_on(row: Tensor, axis: Axis, way: Route | None = None) -> Coming:
    """Sends a row to the next rank; what comes is that of the last."""
    going, coming = [0] * axis.size, [0] * axis.size
    going[(axis.rank + 1) % axis.size] = coming[axis.rank - 1] = row.numel()
    # Where it comes to it is sent on from.
    into = None if way is None else way.next_row(row.numel(), row.dtype)
    return post(row, going, coming, axis, into, way)


def local_of(kernel: Kernel, q: Tensor, v: Tensor) -> Local | None:
    """What computes a part for a kernel; None where it gives no log-sum-exp of such a call."""
    fused = q.is_cuda and q.dtype in HALF and q.shape[3] == v.shape[3] and q.shape[3] % 8 == 0
    if fused and kernel.name in ("auto", "sdpa", "cudnn") and q.shape[3] <= 128:
        return Local(_cudnn, _cudnn_backward)
    if fused and kernel.name in ("auto", "sdpa", "flash_sdpa"):
        return Local(_flash, _flash_backward)
    if kernel.name in ("auto", "sdpa", "reference"):
        kernel = CHUNKED
    return None if kernel.with_lse is None else Local(_ByKernel(kernel), _chunked_backward)


@dataclass(frozen=True)
class _ByKernel:
    kernel: Kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        assert self.kernel.with_lse is not None
        return self.kernel.with_lse(q, k, v, Scoring(scale=scale), *self.kernel.options)


def _chunked_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return chunked_backward(do, q, k, v, o, lse, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Any, ...]:
    aten: Any = torch.ops.aten
    op = aten._scaled_dot_product_flash_attention
    return op(q, expand_heads(k, q), expand_heads(v, q), 0.0, False, False, scale=scale)


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    aten: Any = torch.ops.aten
    op = aten._scaled_dot_product_flash_attention_backward
    cum_q, cum_k, most_q, most_k, seed, offset = rest[:6]
    wide = expand_heads(k, q), expand_heads(v, q)
    found = op(
        do, q, *wide, o, lse, cum_q, cum_k, most_q, most_k, 0.0, False, seed, offset, scale=scale
    )
    return _grouped(found, k)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Any, ...]:
    aten: Any = torch.ops.aten
    op = aten._scaled_dot_product_cudnn_attention
    k, v = expand_heads(k, q), expand_heads(v, q)
    o, lse, *rest = op(q, k, v, None, True, 0.0, False, False, scale=scale)
    return o, lse.reshape(q.shape[:3]), *rest


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    aten: Any = torch.ops.aten
    op = aten._scaled_dot_product_cudnn_attention_backward
    cum_q, cum_k, most_q, most_k, seed, offset = rest[:6]
    wide = expand_heads(k, q), expand_heads(v, q)
    found = op(
        do, q, *wide, o, lse[..., None], seed, offset, None, cum_q, cum_k, most_q, most_k,
        0.0, False, scale=scale,
    )  # fmt: skip
    return _grouped(found, k)


def _grouped(found: tuple[Tensor, ...], k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of repeated heads, summed to those of the heads that there are."""
    dq, dk, dv = found[:3]
    heads = k.shape[1]
    if dk.shape[1] != heads:
        dk, dv = (t.unflatten(1, (heads, -1)).sum(dim=2) for t in (dk, dv))
    return dq, dk, dv
