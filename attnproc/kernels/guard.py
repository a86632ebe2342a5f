"""Guard mode: the first calls of a kernel, compared with the exact one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..records import record, ticket_for
from ..types import KernelCall, Scoring
from .takes import Ask, ask

__all__ = ["Guard", "Inaccurate", "Watch", "error_of"]


class Watch(Protocol):
    """What the calls of a block go through."""

    def run(
        self, kernel: KernelCall, exact: KernelCall, *inputs: Tensor, scoring: Scoring
    ) -> Tensor:
        """The output of `kernel` or of `exact` for q, k and v."""
        ...


class Inaccurate(ArithmeticError):
    """A kernel's output is further from the exact one than was allowed."""


@dataclass(eq=False)
class Guard:
    """Compares a kernel's output with that of the exact automatic choice.

    A graph is the same at every call, so code under `torch.compile` computes the exact output and
    is compared each time, for as long as it runs inside the block.

    Args:
        name: The kernel's.
        max_error: The largest error allowed, as `error_of` counts it.
        calls: How many calls of each kind are compared.
    """

    name: str
    max_error: float
    calls: int
    done: dict[Ask, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ticket = ticket_for(self)

    def run(
        self, kernel: KernelCall, exact: KernelCall, *inputs: Tensor, scoring: Scoring
    ) -> Tensor:
        """The kernel's output, compared while there is something left to compare.

        Raises:
            Inaccurate: The error is too large.
        """
        q, k, v = inputs
        o = kernel(q, k, v, scoring)
        if torch.compiler.is_compiling():
            with torch.no_grad():
                record(self.ticket, _error(o.detach(), exact(q, k, v, scoring).detach()))
            return o
        kind = ask(q, k, v, scoring)
        count = self.done.get(kind, 0)
        if count < self.calls:
            self.done[kind] = count + 1
            with torch.no_grad():
                error = error_of(o, exact(q, k, v, scoring))
            self._judge(error, f" (queries {list(q.shape)}, keys {list(k.shape)}, {q.dtype})")
        return o

    def take(self, found: Tensor) -> None:
        """Judges the error of a compiled call."""
        self._judge(found.item())

    def _judge(self, error: float, where: str = "") -> None:
        if not error <= self.max_error:
            raise Inaccurate(
                f"backend {self.name!r}: its error is {error:.3g}, allowed "
                f"{self.max_error:.3g}{where}"
            )


def error_of(o: Tensor, exact: Tensor) -> float:
    """Root mean square error, relative to the root mean square of what is exact."""
    return _error(o.detach(), exact.detach()).item()


def _error(o: Tensor, exact: Tensor) -> Tensor:
    o, exact = o.double(), exact.double()
    return (o - exact).norm() / exact.norm().clamp(min=1e-30)
