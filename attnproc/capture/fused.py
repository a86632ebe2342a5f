"""Maps of calls of few keys by a fused kernel: one launch a call, and no scores in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import triton
from ..kernels.fusing import fusable, withheld
from ..kernels.reference import factor
from ..kernels.visible import values
from ..types import Scoring

if TYPE_CHECKING:
    from ..kernels.triton.maps import KeyMaps

__all__ = ["how_often", "kind_of", "launch_for", "takes"]


def kind_of(q: Tensor, k: Tensor, scoring: Scoring) -> tuple[Any, ...] | None:
    """All that a launch depends on but the tensors' contents; None if no kernel takes the call.

    The mask is on the device of the queries and keys: attention has been computed of them.
    """
    if withheld() or scoring.causal or scoring.window is not None or scoring.mods:
        return None
    if scoring.keep is not None or isinstance(scoring.scale, Tensor):
        return None
    mask = None if scoring.mask is None else scoring.mask[0]
    return (
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype,
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        scoring.scale, scoring.image, scoring.image_keys,
    )  # fmt: skip


def takes(q: Tensor, k: Tensor, scoring: Scoring, labels: int) -> bool:
    """Whether the kernel takes the calls of a kind that `kind_of` gave, with so many labels."""
    if not fusable(q) or q.dtype != k.dtype or q.stride(3) != 1 or k.stride(3) != 1:
        return False
    mask = values(scoring)
    if mask is not None and mask.shape[0] not in (1, q.shape[0]):
        return False
    return triton.maps.fits(k.shape[2], q.shape[3], labels, q.element_size())


def launch_for(
    q: Tensor, k: Tensor, scoring: Scoring, counts: Tensor, rows: range, queries: range
) -> KeyMaps:
    """The launch for calls of a kind that the kernel takes.

    Args:
        q: All queries ``[B, H, Q, D]``.
        k: All keys ``[B, H', K, D]``.
        scoring: Mask and scale.
        counts: What `how_often` gave.
        rows: Which rows of the batch.
        queries: Which queries.
    """
    scale = factor(q, scoring)
    assert not isinstance(scale, Tensor)
    return triton.maps.KeyMaps(q, k, values(scoring), counts, rows, queries, scale)


def how_often(groups: Sequence[Sequence[int]], keys: int, device: torch.device) -> Tensor:
    """How often each key stands in each group ``[keys, groups]``."""
    counts = [[group.count(key) for group in groups] for key in range(keys)]
    return torch.tensor(counts, dtype=torch.float32, device=device)
