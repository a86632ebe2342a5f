"""The part that records maps beside the kernel call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import Kernel
from ..types import KernelCall, Scoring
from .maps import Maps
from .recorder import Recorder, record
from .together import attended

__all__ = ["Capture"]


@dataclass(frozen=True)
class Capture(Recorder):
    """Records the weights of chosen queries and keys beside the kernel call.

    As the outermost wrapper it sees the whole batch and all heads: what slicing or perturbation
    further in make of the call does not show.

    Args:
        maps: Where the sums are kept.
        layer: Their name there.
    """

    maps: Maps
    layer: str

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        maps, compiling = self.maps, torch.compiler.is_compiling()
        # The graph stays the same at all steps: it computes what may not be wanted.
        if not compiling and not maps.wants(self.layer):
            return kernel(q, k, v, scoring)

        o, lse = attended(kernel, q, k, v, scoring)
        found = maps.reduced(q, k, scoring, lse, _innermost(kernel).linear, self.layer)
        if compiling:
            record(self.ticket, found)
        else:
            maps.add(self.layer, found)
        return o

    def take(self, found: Tensor) -> None:
        """Adds what a graph computed in one call."""
        if self.maps.wants(self.layer):
            self.maps.add(self.layer, found)


def _innermost(call: Any) -> Kernel:
    """The kernel within wrappers and checks."""
    while not isinstance(call, Kernel):
        call = next(arg for arg in call.args if isinstance(arg, Kernel | partial))
    return call
