"""Ring attention: keys and values travel round the ranks, each of which keeps its queries.

A rank never holds the keys of more than two, forward or backward. Source:
https://arxiv.org/abs/2310.01889
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import CHUNKED, Kernel
from ..kernels.chunked import chunked_backward
from ..kernels.reference import expand_heads, factor
from ..kernels.takes import HALF
from ..types import Scoring
from .exchange import Axis, Lost, lost

__all__ = ["Local", "Ring", "local_of"]


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
        scale = factor(q, scoring)
        if isinstance(scale, Tensor):
            q, scale = q * scale.to(q.dtype), 1.0
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
        q, kv = q.contiguous(), _packed(k, v)
        shapes, total = (k.shape, v.shape), torch.promote_types(q.dtype, torch.float32)
        summing = total if wide else q.dtype
        o = lse = rest = None
        for step in range(axis.size):
            # Sent on before it is used, so that the next keys come while these are at work.
            waiting = None if step == axis.size - 1 else _pass_on(kv, axis)
            some, of_some, *rest = local.forward(q, *_unpacked(kv, shapes), scale)
            of_some = of_some.to(total)
            if o is None or lse is None:
                o, lse = some.to(summing), of_some
            else:
                # The share of the new part, by which the sum moves towards it.
                share = torch.sigmoid(of_some - lse)[..., None].to(summing)
                o = o.lerp_(some.to(summing), share)
                lse = torch.logaddexp(lse, of_some)
            kv = kv if waiting is None else waiting()
        assert o is not None
        assert lse is not None
        o = o.to(q.dtype)
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
        kv, shapes = _packed(k, v), (k.shape, v.shape)
        summing = torch.promote_types(q.dtype, torch.float32)
        do = do.contiguous()
        dq, dkv = torch.zeros_like(q, dtype=summing), torch.zeros_like(kv, dtype=summing)
        for step in range(axis.size):
            waiting = None if step == axis.size - 1 else _pass_on(kv, axis)
            of_q, *of_kv = ctx.local.backward(
                do, q, *_unpacked(kv, shapes), o, lse, ctx.scale, ctx.rest
            )
            dq += of_q
            dkv += _packed(*of_kv)
            # The gradients follow their keys, and are home after one more step.
            dkv = _pass_on(dkv, axis)()
            kv = kv if waiting is None else waiting()
        dk, dv = _unpacked(dkv, shapes)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one tensor, which takes one message."""
    return torch.cat((k.reshape(-1), v.reshape(-1)))


def _unpacked(kv: Tensor, shapes: tuple[torch.Size, torch.Size]) -> tuple[Tensor, Tensor]:
    k, v = kv.split([shape.numel() for shape in shapes])
    return k.view(shapes[0]), v.view(shapes[1])


def _pass_on(t: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Sends a tensor to the next rank; what is returned waits for the one from the last."""
    ranks = dist.get_process_group_ranks(axis.group)
    after, before = ranks[(axis.rank + 1) % axis.size], ranks[axis.rank - 1]
    coming = torch.empty_like(t)
    try:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, t, after, axis.group),
                dist.P2POp(dist.irecv, coming, before, axis.group),
            ]
        )
    except RuntimeError as error:
        raise Lost(lost(axis, error)) from error

    def wait() -> Tensor:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise Lost(lost(axis, error)) from error
        return coming

    return wait


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
