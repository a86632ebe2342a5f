"""Attention to some keys and attention to others as attention to all of them, in one pass.

The plain form is `attnproc.parallel.ring.merged`. Both outputs are read once and the sum is
written once, with float32 in between and one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher

__all__ = ["merge"]

# Tokens of a tile.
_TOKENS = 32


@Launcher
@triton.jit
def _merge(
    one, lse, other, of_other, out, length,
    one_batch, one_head, one_token, other_batch, other_head, other_token,
    out_batch, out_head, out_token,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    tokens = (tl.program_id(1) * T + tl.arange(0, T)).to(tl.int64)
    live, d = tokens < length, tl.arange(0, DP)
    inside = live[:, None] & (d < D)[None, :]

    had = tl.load(lse + row * length + tokens, mask=live, other=0.0)
    more = tl.load(of_other + row * length + tokens, mask=live, other=0.0)
    top = tl.maximum(had, more)
    a, b = tl.exp(had - top), tl.exp(more - top)
    tl.store(lse + row * length + tokens, top + tl.log(a + b), mask=live)
    share = (b / (a + b))[:, None]

    places = batch * one_batch + head * one_head + tokens[:, None] * one_token + d[None, :]
    x = tl.load(one + places, mask=inside, other=0.0).to(tl.float32)
    places = batch * other_batch + head * other_head + tokens[:, None] * other_token + d[None, :]
    y = tl.load(other + places, mask=inside, other=0.0).to(tl.float32)
    places = batch * out_batch + head * out_head + tokens[:, None] * out_token + d[None, :]
    tl.store(out + places, (x + (y - x) * share).to(out.dtype.element_ty), mask=inside)


def merge(
    one: Tensor, lse: Tensor, other: Tensor, of_other: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The output in a dtype, and its log-sum-exp; both take the first ones' memory where they can.

    Args:
        one: ``[B, H, S, D]``, attention to some keys.
        lse: Its log-sum-exp ``[B, H, S]`` in float32.
        other: Attention to other keys.
        of_other: Its log-sum-exp.
        dtype: Of the output.
    """
    batch, heads, length, dim = one.shape
    one, other = (t if t.stride(3) == 1 else t.contiguous() for t in (one, other))
    lse, of_other = lse.contiguous(), of_other.contiguous()
    out = one if one.dtype == dtype else torch.empty_like(one, dtype=dtype)
    if one.numel():
        _merge(
            (batch * heads, -(-length // _TOKENS)),
            (one, lse, other, of_other, out),
            (length, *one.stride()[:3], *other.stride()[:3], *out.stride()[:3]),
            (heads, dim, max(16, triton.next_power_of_2(dim)), _TOKENS),
        )
    return out, lse
