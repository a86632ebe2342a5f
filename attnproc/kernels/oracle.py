"""Attention in float64 through the whole matrix of scores: what every kernel is held against.

It shares no code with the kernels, nor with how their masks are lowered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import All, Blocks, Causal, Keys, MaskKind, Window

__all__ = ["oracle"]


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskKind | None = None,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64; arguments as `attnproc.kernels.attention` takes them."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)

    parts = mask.parts if isinstance(mask, All) else () if mask is None else (mask,)
    for part in (*parts, Causal()) if causal else parts:
        seen = _seen(part, scores)
        if seen.dtype == torch.bool:
            scores = torch.where(seen, scores, -torch.inf)
        else:
            scores = scores + seen
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = torch.where(empty, 0.0, scores).softmax(dim=-1)
    lse = torch.where(empty, 0.0, scores).logsumexp(dim=-1).masked_fill(empty[..., 0], -torch.inf)
    return torch.where(empty, 0.0, weights @ v), lse


def _seen(part: MaskKind, scores: Tensor) -> Tensor:
    """One kind as bool or bias that broadcasts to the scores."""
    b, h, i, j = torch.meshgrid(
        *(torch.arange(n, device=scores.device) for n in scores.shape), indexing="ij"
    )
    if isinstance(part, Causal):
        return j <= i
    if isinstance(part, Window):
        left = torch.inf if part.left is None else part.left
        right = torch.inf if part.right is None else part.right
        return (i - j <= left) & (j - i <= right)
    if isinstance(part, Blocks):
        return part.mod(b, h, i, j)
    if isinstance(part, Keys):
        return part.valid[b % part.valid.shape[0], j]
    if isinstance(part, All):
        raise ValueError("mask: combine kinds by &, which leaves none inside another")
    values = part.values
    return values if values.dtype == torch.bool else values.double()
