"""A call under `torch.compile`, with what became of it: graphs, breaks and their reasons."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from measure import time_limit
from torch._dynamo.utils import counters

__all__ = ["Compiled", "compiled", "forget"]

# A pool of compilers starts as many processes as there are cores, amid the timing.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@dataclass(frozen=True)
class Compiled:
    """A compiled call.

    Attributes:
        call: It.
        graphs: How many graphs it became; one is best.
        breaks: In how many places the compiler left the graph.
        reasons: Why, one line each.
        seconds: How long compiling took.
    """

    call: Callable[[], Any]
    graphs: int
    breaks: int
    reasons: list[str]
    seconds: float

    def facts(self) -> dict[str, Any]:
        """As entries of a side's results."""
        facts = {"graphs": self.graphs, "breaks": self.breaks, "compile_s": self.seconds}
        return facts | ({"break_reasons": self.reasons} if self.reasons else {})


def compiled(call: Callable[[], Any], limit: float, mode: str | None = None) -> Compiled:
    """Compiles and runs once.

    Args:
        call: A function without arguments.
        limit: Seconds that compiling may take.
        mode: Of `torch.compile`.

    Raises:
        TimeoutError: It took longer.
    """
    counters.clear()
    start = time.perf_counter()
    run = torch.compile(_apart(call), mode=mode)
    with time_limit(limit):
        run()
    took = round(time.perf_counter() - start, 2)
    breaks = counters["graph_break"]
    reasons = [reason.strip().splitlines()[0][:160] for reason in list(breaks)[:5]]
    return Compiled(run, counters["stats"]["unique_graphs"], sum(breaks.values()), reasons, took)


def forget() -> None:
    """Drops everything that was compiled."""
    torch._dynamo.reset()
    counters.clear()


def _apart(call: Any) -> Callable[[], Any]:
    """The function with code of its own: compiled code is kept, and looked for, by code object."""
    code = call.__code__.replace()
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)
