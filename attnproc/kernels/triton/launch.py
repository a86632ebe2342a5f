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

__all__ = ["Launcher", "Repeated"]

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
    ) -> Callable[..., None] | None:
        """Runs the kernel on the device of its first tensor.

        Args:
            grid: How many programs there are along the two axes.
            tensors: Pointers; None compiles a kernel without that one.
            numbers: What changes between calls.
            fixed: Arguments of compilation.

        Returns:
            What launches the same again with other pointers to multiples of 16 bytes, if that is
            known.
        """
        first = tensors[0]
        assert first is not None
        if _is_current(first):
            return self._launch(grid, tensors, numbers, fixed)
        with torch.cuda.device(first.device):
            return self._launch(grid, tensors, numbers, fixed)

    def _launch(self, grid: Any, tensors: Any, numbers: Any, fixed: Any) -> Any:
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
            return None
        key = (grid, numbers, fixed, *kinds)
        run = self.ready.get(key)
        if run is not None:
            run(*pointers, *numbers, *fixed)
            return run
        compiled = self.kernel[grid](*tensors, *numbers, *fixed)
        # The interpreter compiles nothing.
        if compiled is None:
            return None
        if len(self.ready) >= _MOST:
            self.ready.clear()
        run = self.ready[key] = compiled[(*grid, 1)]
        return run


class Repeated:
    """A launch of which nothing is looked at again but where the tensors are.

    Whoever calls it sees to it that their dtypes and their device stay.

    Args:
        launcher: The kernel.
        grid: As `Launcher` takes it; so are `numbers` and `fixed`.
        numbers: What is no tensor.
        fixed: Arguments of compilation.
    """

    def __init__(
        self,
        launcher: Launcher,
        grid: tuple[int, int],
        numbers: tuple[int | float, ...],
        fixed: tuple[Any, ...],
    ) -> None:
        self.launcher, self.grid, self.numbers, self.fixed = launcher, grid, numbers, fixed
        self.rest = *numbers, *fixed
        self.run: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Runs the kernel on the device of its first tensor."""
        if self.run is not None and _is_current(tensors[0]):
            pointers: list[int | None] = []
            together = 0
            for tensor in tensors:
                pointer = None if tensor is None else tensor.data_ptr()
                together |= pointer or 0
                pointers.append(pointer)
            if not together & _ALIGNED:
                self.run(*pointers, *self.rest)
                return
        self.run = self.launcher(self.grid, tensors, self.numbers, self.fixed)


def _is_current(tensor: Any) -> bool:
    """Whether launches go to a tensor's device now."""
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
