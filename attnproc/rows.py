"""Rows of a batch, such as its conditional half, and entries of an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.visible import OfRows
from .types import MaskMod, Scoring

__all__ = ["part_rows", "rows_from", "scoring_of", "take"]


def part_rows(part: tuple[int, int], batch: int) -> range:
    """The rows of a part: which, of how many.

    Raises:
        ValueError: The batch has no such parts.
    """
    index, count = part
    if batch % count:
        raise ValueError(
            f"part is {part}: a batch of {batch} has no {count} equal parts; give "
            "part=(0, 1) to keep all of it, as without classifier-free guidance"
        )
    return range(index * batch // count, (index + 1) * batch // count)


def scoring_of(scoring: Scoring, rows: Sequence[int], batch: int) -> Scoring:
    """The scoring of some rows of a batch, also of one row several times."""
    mask, keep = scoring.mask, scoring.keep
    if mask is not None and mask[0].shape[0] > 1:
        # A mask for the unperturbed rows alone holds for the perturbed ones too.
        mask = type(mask)(rows_from(mask[0], [row % mask[0].shape[0] for row in rows]))
    mods = tuple(_mod_of(mod, rows, batch) for mod in scoring.mods)
    if keep is not None:
        keep = keep._replace(valid=rows_from(keep.valid, rows))
    return scoring.but(mask=mask, mods=mods, keep=keep)


def rows_from(t: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a batch, also one several times."""
    return take(t, rows, 0)


def _mod_of(mod: MaskMod, rows: Sequence[int], batch: int) -> MaskMod:
    if isinstance(rows, range):
        return mod if rows == range(batch) else OfRows(mod, rows.start)
    return _Rows(mod, tuple(rows))


@dataclass(frozen=True)
class _Rows:
    """A function of positions for some rows of a batch, in any order."""

    mod: MaskMod
    rows: tuple[int, ...]

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = b
        for new, old in enumerate(self.rows):
            row = torch.where(b == new, old, row)
        return self.mod(row, h, i, j)


def take(t: Tensor, at: Sequence[int], dim: int) -> Tensor:
    """Entries of an axis, by slices: no index travels to the device, nothing is looked up."""
    runs = _runs(at)
    if runs == [(0, t.shape[dim])]:
        return t
    parts = [t.narrow(dim, start, length) for start, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _runs(at: Sequence[int]) -> list[tuple[int, int]]:
    """Start and length of each run of following numbers."""
    if isinstance(at, range) and at.step == 1:
        return [(at.start, len(at))]
    runs: list[tuple[int, int]] = []
    for i in at:
        if runs and sum(runs[-1]) == i:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((i, 1))
    return runs
