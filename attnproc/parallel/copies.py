"""Exchanges by copies that a GPU's copy engines make out of its peers' memory.

Attention takes all multiprocessors, so kernels of NCCL run before or after it; copies run beside.
A rank writes its row into one of two slots that its peers can read, and all ranks meet: a tiny
collective on the stream that computes, which the process group's timeout is for. It must not be
left to run beside attention, or it would wait for that to end. Then each rank copies its pieces
out of its peers' slots on a stream of its own.

Why two slots are enough for any number of exchanges in flight: before a rank meets for exchange
j it waits for its own copies of all before. After that meeting all ranks have those, so the row
of j + 1 may take the slot of j - 1. A CUDA graph starts with the same slot whenever it is
replayed, so once there is one, an exchange with none in flight before it begins with a meeting of
its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Copies", "Pull", "Route", "Side", "copies_of", "route", "why_not"]

# Symmetric memory comes in pieces of so many bytes.
_PIECE = 1 << 21

Share = Callable[[Any, int], tuple[Any, list[Tensor]]]
"""(group, bytes) -> the memory of every rank as bytes, own one included, and before it what keeps
it there; all ranks call it."""


class Side:
    """A stream for copies, beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Copies what is second into what is first; gives what the current stream waits by."""
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        # Not by its context, which asks for the current one twice more.
        torch.cuda.set_stream(self._stream)
        try:
            for into, found in pairs:
                into.copy_(found)
        finally:
            torch.cuda.set_stream(main)
        return self._stream.record_event().wait

    def recording(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def finish(self) -> None:
        """Waits for all that was started."""
        torch.cuda.synchronize(self._device)


class Copies:
    """The slots of one group of ranks.

    Args:
        side: Where copies run.
        share: What makes memory that the ranks can read of each other.
        device: Where it is.
    """

    def __init__(self, side: Any, share: Share, device: torch.device) -> None:
        self._side, self._share = side, share
        self._token = torch.zeros(1, dtype=torch.int32, device=device)
        self._own = self._token
        self._memory: list[Tensor] = []
        self._keeper: Any = None
        self._kept: list[Any] = []
        self._size = 0
        self._turn = 0
        self._free = False
        self._graphs = False
        self._last: Pull | None = None
        self.why = ""
        """Why there are none; empty while there may be."""

    def holds(self, size: int, group: Any) -> bool:
        """Whether rows of so many bytes go by copies; all ranks ask for the same.

        Makes the slots larger where it has to.
        """
        if not self.why and size > self._size and not self._side.recording():
            self._grow(-(-size // _PIECE) * _PIECE, group)
        return not self.why and size <= self._size

    def row(self, count: int, dtype: torch.dtype, group: Any) -> Tensor:
        """Room for the row that is posted next."""
        self._open(group)
        return self._slot(self._turn, count, dtype)

    def next_row(self, count: int, dtype: torch.dtype) -> Tensor:
        """Room for what comes by the next `post`, from which it may be sent on."""
        return self._slot(1 - self._turn, count, dtype)

    def post(self, into: Sequence[Tensor], starts: Sequence[int], group: Any) -> Pull:
        """Starts to copy pieces of all ranks' rows, once these are written.

        Args:
            into: Where each rank's piece comes to.
            starts: Where it lies in that rank's row.
            group: The ranks.
        """
        self._open(group)
        self._settle()
        dist.all_reduce(self._token, group=group)
        at = self._turn * self._size
        pairs: list[tuple[Tensor, Tensor]] = []
        for piece, start, memory in zip(into, starts, self._memory, strict=True):
            if piece.numel():
                size = piece.element_size()
                begin = at + start * size
                found = memory[begin : begin + piece.numel() * size].view(piece.dtype)
                pairs.append((piece, found))
        self._turn, self._free = 1 - self._turn, False
        self._last = Pull(self, self._side.start(pairs), into)
        return self._last

    def seen(self, pull: Pull) -> None:
        """Notes that the current stream has waited for some copies, and all before them."""
        if pull is self._last:
            self._last = None

    def _open(self, group: Any) -> None:
        """Makes sure of the slot whose turn it is."""
        self._graphs = self._graphs or self._side.recording()
        if not self._free and self._graphs and self._last is None:
            dist.all_reduce(self._token, group=group)
        self._free = True

    def _settle(self) -> None:
        if self._last is not None:
            self._last.wait()

    def _slot(self, turn: int, count: int, dtype: torch.dtype) -> Tensor:
        at = turn * self._size
        return self._own[at : at + count * dtype.itemsize].view(dtype)

    def _grow(self, size: int, group: Any) -> None:
        # Until all ranks are here, one of them may still read the old slots.
        self._settle()
        self._side.finish()
        if self._graphs:
            self._kept.append((self._keeper, self._own))
        keeper, found, why = None, list[Tensor](), ""
        try:
            with torch.inference_mode(False), torch.no_grad():
                keeper, found = self._share(group, 2 * size)
        except Exception as error:
            why = _said(error)
        self.why = _first(why, group)
        if self.why:
            self._own, self._memory, self._size = self._token, [], 0
        else:
            self._own, self._memory, self._size = found[dist.get_rank(group)], found, size
        self._keeper, self._turn, self._free = keeper, 0, False


class Pull(NamedTuple):
    """Copies on their way."""

    copies: Copies
    arrive: Callable[[], None]
    into: Sequence[Tensor]
    """Held, so that nothing else gets the memory that they write to."""

    def wait(self) -> None:
        """Makes the current stream wait for them."""
        self.arrive()
        self.copies.seen(self)


@dataclass(frozen=True)
class Route:
    """The way by copies of one exchange.

    Args:
        copies: The slots.
        group: The ranks.
        starts: Where the own piece lies in each rank's row.
    """

    copies: Copies
    group: Any
    starts: tuple[int, ...]

    def row(self, count: int, dtype: torch.dtype) -> Tensor:
        """Room for the row, which is posted before another one is asked for."""
        return self.copies.row(count, dtype, self.group)

    def next_row(self, count: int, dtype: torch.dtype) -> Tensor:
        """Room for what comes, which may be the row of the exchange after this."""
        return self.copies.next_row(count, dtype)

    def post(self, into: Tensor, coming: Sequence[int]) -> Pull:
        """Starts the copies into a row that has room for what comes from each rank."""
        return self.copies.post(into.split(list(coming)), self.starts, self.group)


_COPIES: WeakKeyDictionary[Any, Copies] = WeakKeyDictionary()


def route(axis: Any, sent: Callable[[int, int], int], like: Tensor) -> Route | None:
    """The way by copies, or None where NCCL is taken; the same on all ranks.

    Args:
        axis: The ranks.
        sent: How many numbers rank i has for rank j; alike on all ranks.
        like: A tensor of such numbers that is sent as it lies in memory.
    """
    if axis.size == 1 or torch.compiler.is_compiling():
        return None
    if os.environ.get("ATTNPROC_COPIES") == "0":
        return None
    copies = copies_of(axis.group, like.device)
    if copies is None or copies.why:
        return None
    ranks = range(axis.size)
    most = max(sum(sent(i, j) for j in ranks) for i in ranks)
    if not copies.holds(most * like.element_size(), axis.group):
        return None
    starts = tuple(sum(sent(i, j) for j in range(axis.rank)) for i in ranks)
    return Route(copies, axis.group, starts)


def copies_of(group: Any, device: torch.device) -> Copies | None:
    """The slots of a group, made at its first call outside of a CUDA graph; all ranks call it."""
    found = _COPIES.get(group)
    if found is not None:
        return found
    if device.type != "cuda" or "nccl" not in str(dist.get_backend(group)):
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    why = _first(_unreachable(group, device), group)
    with torch.inference_mode(False):
        found = _COPIES[group] = Copies(Side(device), _symmetric, device)
    found.why = why
    return found


def why_not(group: Any) -> str:
    """Why a group that was asked has no copies."""
    found = _COPIES.get(group)
    return "not asked, or no NCCL" if found is None else found.why


def _symmetric(group: Any, size: int) -> tuple[Any, list[Tensor]]:
    from torch.distributed import _symmetric_memory as symmetric

    device = torch.device("cuda", torch.cuda.current_device())
    own = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle: Any = symmetric.rendezvous(own, group=group)
    me = dist.get_rank(group)
    return handle, [
        own if rank == me else handle.get_buffer(rank, (size,), torch.uint8)
        for rank in range(dist.get_world_size(group))
    ]


def _unreachable(group: Any, device: torch.device) -> str:
    """Why this rank can't read the memory of the others; all ranks call it."""
    why = ""
    name = ""
    mine: dict[str, int] = {}
    try:
        from torch.distributed import _symmetric_memory  # noqa: F401 # pyright: ignore

        for i in range(torch.cuda.device_count()):
            mine[str(torch.cuda.get_device_properties(i).uuid)] = i
        name = str(torch.cuda.get_device_properties(device).uuid)
    except Exception as error:
        why = _said(error)
    names: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, name, group=group)
    if why:
        return why
    for rank, other in enumerate(names):
        if rank == dist.get_rank(group):
            continue
        if other == name:
            return f"rank {rank} has the same GPU"
        # A process on another host, too, has a GPU that is not visible here.
        if other not in mine:
            return f"the GPU of rank {rank} is not visible"
        if not torch.cuda.can_device_access_peer(device.index, mine[other]):
            return f"the GPU of rank {rank} can't be read"
    return ""


def _first(why: str, group: Any) -> str:
    """The first reason that any rank has; all ranks call it."""
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, why, group=group)
    return next(filter(None, said), "")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
