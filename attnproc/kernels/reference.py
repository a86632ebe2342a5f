"""Plain attention, which defines what every other kernel computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Scoring
from .base import Kernel
from .takes import Takes
from .visible import dense_mask, values

__all__ = [
    "REFERENCE",
    "expand_heads",
    "factor",
    "masked_scores",
    "masked_softmax",
    "reference",
]


# How many scores are held at a time.
_SCORES = 1 << 25


def reference(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Softmax attention through the scores of whole rows, ``[B, H, Q, K]``.

    The scores have the input's dtype (float32 as `scoring` asks), as eager attention has them.
    Queries with nothing to attend to give zeros. Without gradients, many scores are made for some
    queries at a time.
    """
    queries = q.shape[2]
    step = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    if step >= queries or _graded(q, k, v, scoring):
        return _of_rows(q, k, v, scoring, None)
    starts = range(0, queries, step)
    rows = (slice(start, min(start + step, queries)) for start in starts)
    return torch.cat([_of_rows(q, k, v, scoring, some) for some in rows], dim=2)


def _of_rows(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, rows: slice | None) -> Tensor:
    mask = dense_mask(scoring, q, k, rows)
    q = q if rows is None else q[:, :, rows]
    # The scores live no longer than the softmax.
    weights = masked_softmax(_scores(q, k, scoring), mask).to(q.dtype)
    if scoring.dropout:
        weights = F.dropout(weights, scoring.dropout)
    return weights @ expand_heads(v, q)


def _graded(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether a backward pass would keep all weights anyway."""
    mask = values(scoring)
    leaves = (q, k, v) if mask is None else (q, k, v, mask)
    return torch.is_grad_enabled() and any(t.requires_grad for t in leaves)


def reference_lse(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """`reference` and the log-sum-exp of its scores."""
    scores = masked_scores(_scores(q, k, scoring), dense_mask(scoring, q, k))
    return reference(q, k, v, scoring), scores.logsumexp(dim=-1)


def _scores(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    k = expand_heads(k, q)
    qk = (q.float(), k.float()) if scoring.upcast_qk else (q, k)
    scores, scale = qk[0] @ qk[1].transpose(-1, -2), factor(q, scoring)
    scores = scores * scale if isinstance(scale, Tensor) else scores.mul_(scale)
    return scores.float() if scoring.upcast_softmax else scores


def masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores ``[..., Q, K]`` with a bias added, or -inf where a bool mask is false."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


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


def factor(q: Tensor, scoring: Scoring) -> float | Tensor:
    """What the scores are multiplied by."""
    return q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale


def numbered(q: Tensor, scoring: Scoring) -> tuple[Tensor, float]:
    """Queries, and what their scores are multiplied by as a number, as `Scoring.scaled`."""
    q, scale = scoring.scaled(q)
    return q, q.shape[-1] ** -0.5 if scale is None else scale


REFERENCE = Kernel(
    "reference", reference, takes=Takes(dropout=True, lse=True), with_lse=reference_lse
)
