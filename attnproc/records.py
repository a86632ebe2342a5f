"""A way out of compiled code: what a graph computed goes to a Python object while it runs.

Sums in the graph would make it depend on their first call; a custom op is one node, whatever the
object does.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Taker", "record", "ticket_for"]


class Taker(Protocol):
    """What records go to."""

    def take(self, found: Tensor) -> None:
        """Takes one record."""
        ...


_TAKERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
# A CUDA graph would replay the kernels without the Python around them.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


def ticket_for(taker: Taker) -> Tensor:
    """The number of a taker and how many records it got, as a tensor: a graph holds no number."""
    number = next(_NUMBERS)
    _TAKERS[number] = taker
    return torch.tensor([number, 0])


@torch.library.custom_op("attnproc::record", mutates_args=("ticket",), tags=_TAGS)
def record(ticket: Tensor, found: Tensor) -> None:
    """Hands a record over when the graph that is being traced runs."""
    ticket[1] += 1
    # The graph may use the memory again.
    _TAKERS[int(ticket[0])].take(found.clone())
