"""One of several equal parts of a batch, such as its conditional half."""

from __future__ import annotations

from torch import Tensor

from ..kernels.visible import OfRows
from ..types import Scoring
from .weights import take

__all__ = ["of_part", "part_rows", "scoring_of"]


def part_rows(part: tuple[int, int], batch: int) -> slice:
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
    return slice(index * batch // count, (index + 1) * batch // count)


def of_part(
    part: tuple[int, int], q: Tensor, k: Tensor, scoring: Scoring, lse: Tensor | None
) -> tuple[Tensor, Tensor, Scoring, Tensor | None]:
    """Queries, keys, scoring and log-sum-exp of a part of the batch, without gradients."""
    rows = part_rows(part, q.shape[0])
    q, k, some = q.detach(), k.detach(), scoring_of(scoring, rows, q.shape[0])
    return q[rows], k[rows], some, None if lse is None else lse.detach()[rows]


def scoring_of(scoring: Scoring, rows: slice, batch: int) -> Scoring:
    """The scoring of some rows of the batch."""
    mask, keep = scoring.mask, scoring.keep
    if mask is not None and mask[0].shape[0] > 1:
        # A mask for the unperturbed rows alone holds for the perturbed ones too.
        at = [row % mask[0].shape[0] for row in range(rows.start, rows.stop)]
        mask = type(mask)(take(mask[0], at, 0))
    mods = tuple(OfRows(mod, rows.start) for mod in scoring.mods)
    return scoring._replace(mask=mask, mods=mods, keep=None if keep is None else keep[rows])
