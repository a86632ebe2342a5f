"""What a scoring lets a query see: as one dense tensor, or for a tile of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import and_

import torch
from torch import Tensor

from ..types import Keys, MaskMod, Scoring

__all__ = [
    "OfRows",
    "dense_mask",
    "filled",
    "limits",
    "merged",
    "structure",
    "values",
]


def values(scoring: Scoring) -> Tensor | None:
    """The mask's tensor ``[B|1, H|1, Q|1, K]``, bool or float, without what positions say."""
    mask = scoring.mask
    if mask is None:
        return None
    return mask.valid[:, None, None] if isinstance(mask, Keys) else mask.values


def limits(scoring: Scoring) -> tuple[int | None, int | None]:
    """How far to the left and to the right a query sees; None is without limit."""
    left, right = (None, None) if scoring.window is None else scoring.window
    if scoring.causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def structure(
    scoring: Scoring, rows: slice, cols: slice, batch: int, heads: int, device: torch.device
) -> Tensor | None:
    """What positions show to the queries `rows` of the keys `cols`: bool ``[B|1, H|1, Q, K]``."""
    left, right = limits(scoring)
    if left is None and right is None and not scoring.mods:
        return None
    query = torch.arange(rows.start, rows.stop, device=device)[:, None]
    key = torch.arange(cols.start, cols.stop, device=device)
    parts: list[Tensor] = []
    if right is not None:
        parts.append(key <= query + right)
    if left is not None:
        parts.append(key >= query - left)
    if scoring.mods:
        b = torch.arange(batch, device=device)[:, None, None, None]
        h = torch.arange(heads, device=device)[:, None, None]
        parts += [mod(b, h, query, key) for mod in scoring.mods]
    seen = reduce(and_, parts)
    seen = seen.expand(torch.broadcast_shapes(seen.shape, (query.shape[0], key.shape[0])))
    return seen.reshape((1,) * (4 - seen.ndim) + tuple(seen.shape))


def merged(mask: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """A mask and what is seen as one: bool, or float with -inf where nothing is seen."""
    if mask is None or seen is None:
        return seen if mask is None else mask
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def dense_mask(scoring: Scoring, q: Tensor, k: Tensor, rows: slice | None = None) -> Tensor | None:
    """All of the scoring's masks as one tensor ``[B|1, H|1, Q|1, K]``, bool or float.

    With `rows` it is that of these queries alone.
    """
    some, cols = rows or slice(0, q.shape[2]), slice(0, k.shape[2])
    seen = structure(scoring, some, cols, q.shape[0], q.shape[1], q.device)
    mask = values(scoring)
    if rows is not None and mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, rows]
    return merged(mask, seen)


def filled(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask whose empty rows show everything, and which rows are not empty ``[..., Q|1, 1]``.

    For kernels that make NaN or a mean of a row without any key: what they make of it instead is
    finite, and the caller sets it to zero.
    """
    if mask.dtype == torch.bool:
        some = mask.any(dim=-1, keepdim=True)
        return mask | ~some, some
    some = (mask > -torch.inf).any(dim=-1, keepdim=True)
    return mask.masked_fill(~some, 0.0), some


@dataclass(frozen=True)
class OfRows:
    """A function of positions for a part of the batch, or of the heads.

    Args:
        mod: The function for all of it.
        start: The first row of the part.
        head: The first head of the part.
    """

    mod: MaskMod
    start: int
    head: int = 0

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.mod(b + self.start, h + self.head, i, j)
