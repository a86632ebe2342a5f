"""Attention weights of some queries and keys, exact, in memory for some queries at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference import expand_heads, factor, masked_scores, masked_softmax
from ..kernels.visible import merged, structure, values
from ..masks import factors
from ..rows import take
from ..types import Scoring

__all__ = ["at_once", "key_weights", "linear_weights", "weights"]

# Scores held at a time, over batch, heads, queries of a chunk and keys. On other devices than a
# CPU the memory is there, and each chunk is several launches.
_CHUNK = 1 << 22
_FURTHER = 1 << 24


def at_once(q: Tensor) -> int:
    """How many scores are held at a time on the device of `q`."""
    return _CHUNK if q.device.type == "cpu" else _FURTHER


def weights(
    q: Tensor,
    k: Tensor,
    scoring: Scoring,
    rows: Sequence[int] | None = None,
    cols: Sequence[int] | None = None,
    lse: Tensor | None = None,
) -> Iterator[Tensor]:
    """Weights of chosen queries and keys, a chunk of the queries at a time.

    Args:
        q: All queries ``[B, H, Q, D]``.
        k: All keys ``[B, H', K, D]``; the softmax is over all of them.
        scoring: Mask, causality and scale, as the kernel gets them.
        rows: Positions of the queries; None is all.
        cols: Positions of the keys; None is all.
        lse: Log-sum-exp ``[B, H, Q]`` of the scores, which saves the work for other keys.

    Yields:
        Weights ``[B, H, rows, cols]`` in float32 at least. Queries with nothing to attend to have
        none.
    """
    batch, heads, total = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = range(total) if rows is None else rows
    cols = range(k.shape[2]) if cols is None else cols
    held = range(k.shape[2]) if lse is None else cols
    k = (take(expand_heads(k, q), held, 2).to(wide) * factor(q, scoring)).transpose(-1, -2)
    masked = not scoring.only_causal

    step = max(1, at_once(q) // (batch * heads * len(held)))
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        scores = take(q, some, 2).to(wide) @ k
        mask = _mask(scoring, some, held, q, k)
        if lse is None:
            found = take(masked_softmax(scores, mask), cols, 3)
        else:
            norm = take(lse, some, 2)[..., None]
            found = (masked_scores(scores, mask) - norm).exp()
            # Without a mask no query is without keys.
            found = found.masked_fill(norm == -torch.inf, 0) if masked else found
        if scoring.keep is not None:
            found = found * take(scoring.keep.valid, some, 1)[:, None, :, None]
        yield found


def linear_weights(
    q: Tensor,
    k: Tensor,
    scoring: Scoring,
    rows: Sequence[int] | None = None,
    cols: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """As `weights`, of attention without a softmax: ``relu(q) relu(k)`` over their sum."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = range(q.shape[2]) if rows is None else rows
    cols = range(k.shape[2]) if cols is None else cols
    k = F.relu(expand_heads(k, q)).to(wide)
    mask = factors(scoring, wide)
    k = k if mask is None else k * mask.transpose(-1, -2)
    total, some = k.sum(dim=2, keepdim=True), take(k, cols, 2)

    step = max(1, at_once(q) // (q.shape[0] * q.shape[1] * len(cols)))
    for first in range(0, len(rows), step):
        part = F.relu(take(q, rows[first : first + step], 2)).to(wide)
        norm = (part * total).sum(dim=-1, keepdim=True) + scoring.eps
        yield part @ some.transpose(-1, -2) / norm


def key_weights(
    q: Tensor, k: Tensor, keys: Sequence[int], scoring: Scoring, queries: range | None = None
) -> Tensor:
    """Weights ``[B, Q, n]`` of some keys, mean over heads; as `weights` in one tensor."""
    parts = [part.mean(dim=1) for part in weights(q, k, scoring, queries, keys)]
    return torch.cat(parts, dim=1)


def _mask(
    scoring: Scoring, rows: Sequence[int], cols: Sequence[int], q: Tensor, k: Tensor
) -> Tensor | None:
    """All masks for some queries and keys ``[B|1, H|1, rows|1, cols]``."""
    mask = values(scoring)
    if mask is not None:
        mask = take(mask, cols, 3)
        mask = mask if mask.shape[2] == 1 else take(mask, rows, 2)
    (of_rows, some_rows), (of_cols, some_cols) = _span(rows), _span(cols)
    seen = structure(scoring, of_rows, of_cols, q.shape[0], q.shape[1], q.device)
    if seen is not None:
        seen = take(take(seen, some_rows, 2), some_cols, 3)
    return merged(mask, seen)


def _span(at: Sequence[int]) -> tuple[slice, Sequence[int]]:
    """What the positions lie within, and they counted from its start."""
    if isinstance(at, range) and at.step == 1:
        return slice(at.start, at.stop), range(len(at))
    first = min(at)
    return slice(first, max(at) + 1), [i - first for i in at]
