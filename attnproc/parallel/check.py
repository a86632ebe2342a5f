"""What ranks have to agree on, before anything is exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from .exchange import Axis, Lost, lost

__all__ = ["Disagree", "agree", "lengths"]

_AGREED: set[tuple[Any, ...]] = set()


class Disagree(ValueError):
    """The ranks call with different shapes or settings."""


def agree(axis: Axis, facts: Mapping[str, Any]) -> None:
    """Compares facts between ranks, once for all that are alike.

    Raises:
        Disagree: They differ; the message, the same on every rank, says in what.
        Lost: A rank did not answer in time.
    """
    if axis.size == 1 or torch.compiler.is_compiling():
        return
    key = (axis.group, tuple(facts.values()))
    if key in _AGREED:
        return
    found: list[Any] = [None] * axis.size
    try:
        dist.all_gather_object(found, dict(facts), group=axis.group)
    except RuntimeError as error:
        raise Lost(lost(axis, error)) from error
    wrong = [name for name in facts if any(other.get(name) != found[0][name] for other in found)]
    if wrong:
        ranks = dist.get_process_group_ranks(axis.group)
        of = "; ".join(
            f"{name} is "
            + ", ".join(
                f"{other.get(name)} on rank {rank}"
                for rank, other in zip(ranks, found, strict=True)
            )
            for name in wrong
        )
        raise Disagree(f"the ranks call attention differently, nothing was exchanged: {of}")
    _AGREED.add(key)


def lengths(axis: Axis, *own: int, device: torch.device) -> list[tuple[int, ...]]:
    """How many tokens each rank has, for each of some sequences."""
    if axis.size == 1:
        return [(count,) for count in own]
    mine = torch.tensor([own], device=device)
    try:
        found = collectives.wait_tensor(collectives.all_gather_tensor(mine, 0, axis.group))
    except RuntimeError as error:
        raise Lost(lost(axis, error)) from error
    return [tuple(counts) for counts in found.T.tolist()]
