"""Launches of Triton kernels without Triton's own look at every argument.

That look costs the CPU as much as several launches of torch's kernels. It says how a kernel is
compiled, which depends on dtypes, on whole numbers and on whether pointers are multiples of 16
bytes alone, so what it found serves every later launch with the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["Launcher"]

_ALIGNED = 15
# How many launches are kept for a kernel; shapes of a model are few.
_MOST = 512
# Since then a compiled kernel takes all arguments of its source, those of compilation too.
_KNOWN = (3, 3) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (4,)


class Launcher:
    """A Triton kernel that takes tensors first, then numbers, then arguments of compilation.

    Args:
        kernel: What `triton.jit` gave.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.ready: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int | float, ...],
        fixed: tuple[Any, ...],
    ) -> None:
        """Runs the kernel on the device of its first tensor.

        Args:
            grid: How many programs there are along the two axes.
            tensors: Pointers; None compiles a kernel without that one.
            numbers: What changes between calls.
            fixed: Arguments of compilation.
        """
        first = tensors[0]
        assert first is not None
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            self._launch(grid, tensors, numbers, fixed)
        else:
            with torch.cuda.device(first.device):
                self._launch(grid, tensors, numbers, fixed)

    def _launch(self, grid: Any, tensors: Any, numbers: Any, fixed: Any) -> None:
        pointers: list[int | None] = []
        kinds: list[Any] = []
        together = 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                kinds.append(None)
            else:
                pointer = tensor.data_ptr()
                together |= pointer
                pointers.append(pointer)
                kinds.append(tensor.dtype)
                # The kernel would read a pointer to another device's memory as its own.
                kinds.append(tensor.get_device())
        if together & _ALIGNED or not _KNOWN:
            self.kernel[grid](*tensors, *numbers, *fixed)
            return
        key = (grid, numbers, fixed, *kinds)
        run = self.ready.get(key)
        if run is not None:
            run(*pointers, *numbers, *fixed)
            return
        compiled = self.kernel[grid](*tensors, *numbers, *fixed)
        # The interpreter compiles nothing.
        if compiled is not None:
            if len(self.ready) >= _MOST:
                self.ready.clear()
            self.ready[key] = compiled[(*grid, 1)]
