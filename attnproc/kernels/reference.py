"""Plain attention, which defines what every other kernel computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Bias, Keys, Mask, Scoring
from .base import Kernel

__all__ = ["REFERENCE", "dense_mask", "expand_heads", "masked_softmax", "reference"]


def reference(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Softmax attention through the whole ``[B, H, Q, K]`` score matrix.

    The scores have the input's dtype (float32 as `scoring` asks), as eager attention has them.
    Queries with nothing to attend to give zeros.
    """
    k, v = expand_heads(k, q), expand_heads(v, q)
    qk = (q.float(), k.float()) if scoring.upcast_qk else (q, k)
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = (qk[0] @ qk[1].transpose(-1, -2)) * scale
    if scoring.upcast_softmax:
        scores = scores.float()

    return masked_softmax(scores, dense_mask(scoring, q, k)).to(q.dtype) @ v


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of scores ``[..., Q, K]`` under a mask; rows without a key are zero."""
    if mask is None:
        return scores.softmax(dim=-1)
    if mask.dtype != torch.bool:
        scores = scores + mask
        mask = mask > -torch.inf
    # The finite filler keeps rows without any key, and their gradients, free of NaN.
    filler = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, filler).softmax(dim=-1).masked_fill(~mask, 0)


def expand_heads(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values ``[B, H', K, D]`` repeated to the heads of `q`."""
    groups = q.shape[1] // t.shape[1]
    return t if groups == 1 else t.repeat_interleave(groups, dim=1)


def dense_mask(scoring: Scoring, q: Tensor, k: Tensor) -> Tensor | None:
    """The scoring's mask and causality as one tensor ``[B|1, H|1, Q|1, K]``, bool or float."""
    mask = _values(scoring.mask)
    if not scoring.causal:
        return mask
    lower = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return lower[None, None]
    return mask & lower if mask.dtype == torch.bool else mask.masked_fill(~lower, -torch.inf)


def _values(mask: Mask | None) -> Tensor | None:
    if isinstance(mask, Keys):
        return mask.valid[:, None, None]
    return mask.values if isinstance(mask, Bias) else None


REFERENCE = Kernel("reference", reference)
