"""Attention by tiles of queries and keys in plain torch: any device, any mask, never Q x K memory.

The softmax runs along (https://arxiv.org/abs/1805.02867), the backward pass computes the weights
of a tile anew (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..types import Scoring
from .base import Kernel
from .reference import numbered
from .takes import Takes
from .visible import limits, structure, values

__all__ = ["CHUNKED", "chunked", "chunked_backward", "chunked_lse"]

# Scores of a tile over batch and heads: what fits a CPU's caches, and what keeps a GPU busy.
_SCORES = {"cpu": 1 << 20}
_SCORES_ELSEWHERE = 1 << 24


class _Tile(NamedTuple):
    rows: slice
    cols: slice


def chunked(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention by tiles, accumulated in float32 at least."""
    return chunked_lse(q, k, v, scoring)[0]


def chunked_lse(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """`chunked` and the log-sum-exp of its scores ``[B, H, Q]``; both have gradients."""
    q, scale = numbered(q, scoring)
    positions = Scoring(causal=scoring.causal, window=scoring.window, mods=scoring.mods)
    return _Chunked.apply(q, k, v, values(scoring), positions, scale)


def chunked_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v without a mask, given that of the output.

    Output and log-sum-exp may be those of more keys than `k` has: what comes is the part of the
    gradients that flows through the weights of these.
    """
    work = _Work(q, k, v, None, Scoring(), scale)
    return _backward(work, o, lse, do, torch.zeros_like(lse))[:3]


class _Work(NamedTuple):
    """What the tiles of one call have in common."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    positions: Scoring
    scale: float

    @property
    def wide(self) -> torch.dtype:
        """What is accumulated in."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def queries(self, rows: slice) -> Tensor:
        return self.q[:, :, rows].to(self.wide)

    def keys(self, cols: slice) -> Tensor:
        return self.k[:, :, cols].to(self.wide)

    def values(self, cols: slice) -> Tensor:
        return self.v[:, :, cols].to(self.wide)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        positions: Scoring,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        work = _Work(q, k, v, mask, positions, scale)
        parts = [_row(work, rows) for rows in _spans(q.shape[2], _sides(q, k)[0])]
        o, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        ctx.save_for_backward(q, k, v, mask, o, lse)
        ctx.positions, ctx.scale = positions, scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, do: Tensor, dlse: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, mask, o, lse = ctx.saved_tensors
        grads = _backward(_Work(q, k, v, mask, ctx.positions, ctx.scale), o, lse, do, dlse)
        needed = ctx.needs_input_grad[:4]
        return *(g if n else None for g, n in zip(grads, needed, strict=True)), None, None


def _row(work: _Work, rows: slice) -> tuple[Tensor, Tensor]:
    """The output ``[B, H, rows, D]`` and log-sum-exp of some queries, over all keys."""
    q, k, v = work.q, work.k, work.v
    shape = (*q.shape[:2], rows.stop - rows.start)
    top = q.new_full(shape, -torch.inf, dtype=work.wide)
    total, sums = torch.zeros_like(top), q.new_zeros(*shape, v.shape[3], dtype=work.wide)
    for cols in _spans(k.shape[2], _sides(q, k)[1]):
        tile = _Tile(rows, cols)
        if _is_hidden(tile, work.positions):
            continue
        scores = _scores(work, tile)
        new = torch.maximum(top, scores.amax(dim=-1))
        # A row that has seen no key yet has no finite top.
        base = new.masked_fill(new == -torch.inf, 0)
        weights, shrink = scores.sub_(base[..., None]).exp_(), (top - base).exp()
        total = total * shrink + weights.sum(dim=-1)
        sums = sums * shrink[..., None] + _times(weights, work.values(cols))
        top = new
    out = sums / total.masked_fill(total == 0, 1)[..., None]
    return out.to(q.dtype), top + total.log()


def _backward(
    work: _Work, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, mask = work[:4]
    dq, dk, dv = (torch.zeros_like(t, dtype=work.wide) for t in (q, k, v))
    fixed = mask is None or mask.dtype == torch.bool
    dmask = None if mask is None or fixed else torch.zeros_like(mask, dtype=work.wide)
    base = lse.masked_fill(lse == -torch.inf, 0)
    for tile in _tiles(q, k, work.positions):
        rows, cols = tile
        some = do[:, :, rows].to(work.wide)
        weights = _scores(work, tile).sub_(base[:, :, rows, None]).exp_()
        dv[:, :, cols] += _times_transposed(weights, some, k.shape[1])
        inner = (some * o[:, :, rows].to(work.wide)).sum(dim=-1) - dlse[:, :, rows].to(work.wide)
        dscores = _times(some, work.values(cols).transpose(-1, -2))
        dscores = dscores.sub_(inner[..., None]).mul_(weights)
        if dmask is not None:
            _add_to(dmask, dscores, tile)
        dscores = dscores.mul_(work.scale)
        dq[:, :, rows] += _times(dscores, work.keys(cols))
        dk[:, :, cols] += _times_transposed(dscores, work.queries(rows), k.shape[1])
    grads = (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))
    return *grads, None if mask is None or dmask is None else dmask.to(mask.dtype)


def _scores(work: _Work, tile: _Tile) -> Tensor:
    """Masked scores of a tile ``[B, H, rows, cols]``, a tensor of its own."""
    rows, cols = tile
    scores = _times(work.queries(rows) * work.scale, work.keys(cols).transpose(-1, -2))
    if work.mask is not None:
        part = _part(work.mask, tile)
        if part.dtype == torch.bool:
            scores = scores.masked_fill_(~part, -torch.inf)
        else:
            scores = scores + part.to(work.wide)
    batch, heads = work.q.shape[:2]
    seen = structure(work.positions, rows, cols, batch, heads, work.q.device)
    return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)


def _part(mask: Tensor, tile: _Tile) -> Tensor:
    rows = tile.rows if mask.shape[2] > 1 else slice(None)
    return mask[:, :, rows, tile.cols]


def _add_to(dmask: Tensor, dscores: Tensor, tile: _Tile) -> None:
    part = _part(dmask, tile)
    part += dscores.sum_to_size(part.shape)


def _times(rows: Tensor, right: Tensor) -> Tensor:
    """``[B, H, Q, n] @ [B, H', n, m]``, each of the H' for a group of heads, not repeated."""
    count = right.shape[1]
    folded = rows.unflatten(1, (count, -1)).flatten(2, 3)  # [B, H', groups * Q, n]
    return (folded @ right).unflatten(2, (-1, rows.shape[2])).flatten(1, 2)


def _times_transposed(weights: Tensor, rows: Tensor, count: int) -> Tensor:
    """``[B, H, Q, n]^T @ [B, H, Q, m]`` summed over each group of heads: ``[B, H', n, m]``."""
    left, right = (t.unflatten(1, (count, -1)).flatten(2, 3) for t in (weights, rows))
    return left.transpose(-1, -2) @ right


def _tiles(q: Tensor, k: Tensor, positions: Scoring) -> Iterator[_Tile]:
    side, other = _sides(q, k)
    for rows in _spans(q.shape[2], side):
        for cols in _spans(k.shape[2], other):
            if not _is_hidden(_Tile(rows, cols), positions):
                yield _Tile(rows, cols)


def _is_hidden(tile: _Tile, positions: Scoring) -> bool:
    """Whether a tile lies wholly outside the window."""
    left, right = limits(positions)
    (first, last), (low, high) = ((s.start, s.stop - 1) for s in tile)
    return (right is not None and low > last + right) or (left is not None and high < first - left)


def _sides(q: Tensor, k: Tensor) -> tuple[int, int]:
    """How many queries and keys a tile has."""
    most = _SCORES.get(q.device.type, _SCORES_ELSEWHERE) // (q.shape[0] * q.shape[1])
    rows = min(q.shape[2], max(16, math.isqrt(max(1, most))))
    return rows, min(k.shape[2], max(16, most // rows))


def _spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, max(1, step))]


CHUNKED = Kernel("chunked", chunked, takes=Takes(lse=True), with_lse=chunked_lse)
