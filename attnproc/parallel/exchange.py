"""Collectives of torch, as a sending of tensors to every rank that has gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from .copies import Route

__all__ = [
    "ALONE",
    "Axis",
    "Coming",
    "Lost",
    "direct",
    "gather",
    "lost",
    "post",
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
    sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
    flat = torch.cat([part.reshape(-1) for of_rank in parts for part in of_rank])
    going = [sum(part.numel() for part in of_rank) for of_rank in parts]
    got = post(flat, going, [sum(of_rank) for of_rank in sizes], axis).wait()
    return [
        [t.view(shape) for t, shape in zip(piece.split(of_rank), of_shapes, strict=True)]
        for piece, of_rank, of_shapes in zip(
            got.split([sum(of_rank) for of_rank in sizes]), sizes, shapes, strict=True
        )
    ]


class Coming(NamedTuple):
    """A row of numbers that is on its way, one rank's after another."""

    row: Tensor
    axis: Axis
    work: Any = None
    """What to wait for; None where torch keeps it with the tensor."""

    def wait(self) -> Tensor:
        """The row, once it is there.

        Raises:
            Lost: Another rank ended, or did not answer within the group's timeout.
        """
        try:
            if self.work is None:
                return collectives.wait_tensor(self.row)
            self.work.wait()
        except RuntimeError as error:
            raise Lost(lost(self.axis, error)) from error
        return self.row


def direct(t: Tensor) -> bool:
    """Whether a tensor is sent as it lies in memory: no gradient, and no graph being traced."""
    wanted = torch.is_grad_enabled() and t.requires_grad
    return not (wanted or torch.compiler.is_compiling())


def post(
    row: Tensor,
    going: Sequence[int],
    coming: Sequence[int],
    axis: Axis,
    into: Tensor | None = None,
    way: Route | None = None,
) -> Coming:
    """Starts to send the pieces of a row to the ranks.

    Args:
        row: Numbers ``[N]``, those for the first rank first.
        going: How many each rank gets.
        coming: How many come from each.
        axis: The ranks.
        into: Where they come to, for what is `direct`; else it is made.
        way: The way by copies, in whose room the row then lies.
    """
    try:
        if direct(row):
            into = row.new_empty(sum(coming)) if into is None else into
            if way is not None:
                return Coming(into, axis, way.post(into, coming))
            # Less work for the CPU than torch's functional collectives.
            work = dist.all_to_all_single(
                into, row, list(coming), list(going), axis.group, async_op=True
            )
            return Coming(into, axis, work)
        with_grad = torch.is_grad_enabled() and row.requires_grad
        run = (
            collectives.all_to_all_single_autograd if with_grad else collectives.all_to_all_single
        )
        return Coming(run(row, list(coming), list(going), axis.group), axis)
    except RuntimeError as error:
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


def lost(axis: Axis, error: Exception) -> str:
    """What is said of a collective that failed."""
    return (
        f"rank {dist.get_rank()}: an exchange with the ranks "
        f"{dist.get_process_group_ranks(axis.group)} failed; one of them ended or did not answer "
        f"within the timeout of the process group. {str(error).splitlines()[0]}"
    )
