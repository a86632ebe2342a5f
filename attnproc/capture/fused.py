"""Maps of a call of few keys by a fused kernel: one launch, and no scores in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.fusing import fusable
from ..kernels.reference import factor
from ..kernels.visible import values
from ..types import Scoring

__all__ = ["fused", "how_often", "takes"]


def takes(q: Tensor, k: Tensor, scoring: Scoring, labels: int) -> bool:
    """Whether the kernel can stand in for `weights`, with so many labels."""
    if torch.compiler.is_compiling() or not fusable(q) or isinstance(scoring.scale, Tensor):
        return False
    if scoring.causal or scoring.window is not None or scoring.mods or scoring.keep is not None:
        return False
    if q.dtype != k.dtype or q.stride(3) != 1 or k.stride(3) != 1:
        return False
    mask = values(scoring)
    if mask is not None and mask.shape[0] not in (1, q.shape[0]):
        return False
    from ..kernels.triton.maps import fits

    return fits(k.shape[2], q.shape[3], labels, q.element_size())


def fused(
    q: Tensor,
    k: Tensor,
    scoring: Scoring,
    counts: Tensor,
    rows: range,
    queries: range,
    into: Tensor | None,
) -> Tensor:
    """Weights ``[rows, queries, labels]`` of a call that the kernel takes, mean over heads.

    Args:
        q: All queries ``[B, H, Q, D]``.
        k: All keys ``[B, H', K, D]``.
        scoring: Mask and scale.
        counts: What `how_often` gave.
        rows: Which rows of the batch.
        queries: Which queries.
        into: A sum of such, to which they are added in place if they fit.
    """
    from ..kernels.triton.maps import key_maps

    size = len(rows), len(queries), counts.shape[1]
    if into is not None and not _fits(into, size, q.device):
        into = None
    scale = factor(q, scoring)
    assert not isinstance(scale, Tensor)
    return key_maps(q, k, counts, rows, queries, scale, values(scoring), into)


def how_often(groups: Sequence[Sequence[int]], keys: int, device: torch.device) -> Tensor:
    """How often each key stands in each group ``[keys, groups]``."""
    counts = [[group.count(key) for group in groups] for key in range(keys)]
    return torch.tensor(counts, dtype=torch.float32, device=device)


def _fits(into: Tensor, size: tuple[int, int, int], device: torch.device) -> bool:
    """Whether it is what the kernel would give."""
    alike = into.dtype == torch.float32 and into.is_contiguous() and into.device == device
    return alike and into.shape == size
