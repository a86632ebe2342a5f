"""Collectives of torch, as a sending of tensors to every rank that has gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

__all__ = [
    "ALONE",
    "Axis",
    "Lost",
    "gather",
    "lost",
    "post",
    "received",
    "send",
    "shares",
    "spans",
]


class Lost(RuntimeError):
    """A collective came to nothing: another rank ended, or did not answer in time."""


class Axis(NamedTuple):
    """The ranks of one axis of a mesh, as this process sees them."""

    group: Any
    """A process group; None for one rank alone."""
    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, mesh: Any) -> Axis:
        """The axis of a mesh of one dimension."""
        if mesh.size() == 1:
            return ALONE
        return cls(mesh.get_group(), mesh.size(), mesh.get_local_rank())


ALONE = Axis(None)


def shares(total: int, ranks: int) -> tuple[int, ...]:
    """How many of `total` each rank has: as many, the first ones perhaps one more."""
    each, more = divmod(total, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def spans(counts: Sequence[int]) -> list[slice]:
    """Where each of some counts lies, one after another."""
    return [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]


def send(parts: Sequence[Sequence[Tensor]], shapes: Any, axis: Axis) -> list[list[Tensor]]:
    """Gives every rank its tensors; all ranks call it at once.

    Args:
        parts: The tensors for each rank.
        shapes: The shapes of what comes from each rank, in its order.
        axis: The ranks.

    Returns:
        The tensors from each rank. Gradients go the way back.

    Raises:
        Lost: Another rank ended, or did not answer within the group's timeout.
    """
    if axis.size == 1:
        return [list(parts[0])]
    sizes = [[_count(shape) for shape in of_rank] for of_rank in shapes]
    going = [_flat(list(of_rank)) for of_rank in parts]
    got = received(post(going, [sum(of_rank) for of_rank in sizes], axis), axis)
    return [
        [t.view(shape) for t, shape in zip(piece.split(of_rank), of_shapes, strict=True)]
        for piece, of_rank, of_shapes in zip(
            got.split([sum(of_rank) for of_rank in sizes]), sizes, shapes, strict=True
        )
    ]


def post(parts: Sequence[Tensor], coming: Sequence[int], axis: Axis) -> Tensor:
    """Starts to send a tensor to every rank; `received` gives what comes.

    Args:
        parts: The tensor for each rank.
        coming: How many numbers come from each.
        axis: The ranks.
    """
    flat, going = _flat(list(parts)), [part.numel() for part in parts]
    # Without a gradient the plain one does, which inference mode takes too.
    with_grad = torch.is_grad_enabled() and flat.requires_grad
    run = collectives.all_to_all_single_autograd if with_grad else collectives.all_to_all_single
    try:
        return run(flat, list(coming), going, axis.group)
    except (RuntimeError, dist.DistBackendError) as error:
        raise Lost(lost(axis, error)) from error


def received(at: Tensor, axis: Axis) -> Tensor:
    """What came of `post`, one rank's after another, in one row."""
    try:
        return collectives.wait_tensor(at)
    except (RuntimeError, dist.DistBackendError) as error:
        raise Lost(lost(axis, error)) from error


def gather(t: Tensor, counts: Sequence[int], dim: int, axis: Axis) -> Tensor:
    """The parts of all ranks along an axis of `t`, of which rank i has ``counts[i]``.

    The gradient of a part is the sum of what all ranks have for it.
    """
    if axis.size == 1:
        return t
    t = t.movedim(dim, 0)
    shapes = [[(count, *t.shape[1:])] for count in counts]
    parts = send([[t]] * axis.size, shapes, axis)
    return torch.cat([part for (part,) in parts]).movedim(0, dim)


def _flat(parts: list[Tensor]) -> Tensor:
    """All of some tensors, one after another."""
    if len(parts) == 1:
        return parts[0].reshape(-1)
    if all(part.shape == parts[0].shape for part in parts):
        return torch.cat(parts).flatten()
    return torch.cat([part.reshape(-1) for part in parts])


def lost(axis: Axis, error: Exception) -> str:
    """What is said of a collective that failed."""
    return (
        f"rank {dist.get_rank()}: an exchange with the ranks "
        f"{dist.get_process_group_ranks(axis.group)} failed; one of them ended or did not answer "
        f"within the timeout of the process group. {str(error).splitlines()[0]}"
    )


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
