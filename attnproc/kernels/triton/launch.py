"""Launches of Triton kernels without Triton's own look at every argument, and in compiled code.

That look costs the CPU as much as several launches of torch's kernels. It says how a kernel is
compiled, which depends on dtypes, on whole numbers and on whether pointers are multiples of 16
bytes alone, so what it found serves every later launch with the same.

Compiled code launches kernels itself: their operators are taken apart when a graph is made, since
an operator in Python costs the CPU more than several launches each time that it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..fusing import INTERPRETED

__all__ = ["Launcher", "Plans", "Repeated", "Run", "operator", "padded", "wrap_triton"]

_ALIGNED = 15
# How many kinds of calls are kept; shapes of a model are few.
_MOST = 512
# Since then a compiled kernel takes all arguments of its source, those of compilation too.
_KNOWN = (3, 3) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (4,)

Run = Callable[
    [tuple[int, int], tuple[Tensor | None, ...], tuple[int | float, ...], tuple[Any, ...]], None
]
"""What runs a kernel, with the arguments of a `Launcher`."""


Plan = TypeVar("Plan")


class Plans(dict[Any, Plan]):
    """What was worked out for kinds of calls, of which there are not to be too many."""

    def keep(self, kind: Any, plan: Plan) -> Plan:
        """Takes one in and gives it back."""
        if len(self) >= _MOST:
            self.clear()
        self[kind] = plan
        return plan


class Launcher:
    """A Triton kernel that takes tensors first, then numbers, then arguments of compilation.

    Args:
        fn: What `triton.jit` gave.
        options: Of every launch, such as `num_warps`.
    """

    def __init__(self, fn: Any, **options: Any) -> None:
        self.fn, self.options = fn, options
        self.ready: Plans[Callable[..., None]] = Plans()

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
        if not _KNOWN:
            self.fn[grid](*tensors, *numbers, *fixed, **self.options)
            return None
        aligned = not together & _ALIGNED
        if not aligned:
            # As the imaginary parts of complex numbers are not.
            kinds += [pointer is not None and not pointer & _ALIGNED for pointer in pointers]
        key = (grid, numbers, fixed, *kinds)
        run = self.ready.get(key)
        if run is None:
            compiled = self.fn[grid](*tensors, *numbers, *fixed, **self.options)
            # The interpreter compiles nothing.
            if compiled is None:
                return None
            run = self.ready.keep(key, _bound(compiled, grid, tensors[0].get_device()))
        else:
            run(*pointers, *numbers, *fixed)
        return run if aligned else None


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


def _bound(compiled: Any, grid: tuple[int, int], device: int) -> Callable[..., None]:
    """What launches a compiled kernel again, given all its arguments, pointers as numbers.

    Triton's own way keeps a record of each launch and calls the hooks of profilers with it, which
    costs as much as a launch of torch's where there are none.
    """
    plain: Callable[..., None] = compiled[(*grid, 1)]
    hooks = getattr(getattr(triton, "knobs", None), "runtime", None)
    chains = [getattr(hooks, f"launch_{side}_hook", None) for side in ("enter", "exit")]
    if device < 0 or not all(hasattr(chain, "calls") for chain in chains):
        return plain
    before, after = chains
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    stream: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
    x, y = grid

    def launch(*args: Any) -> None:
        if before.calls or after.calls:
            plain(*args)
        else:
            run(x, y, 1, stream(device), function, packed, None, None, None, *args)

    return launch


def _is_current(tensor: Any) -> bool:
    """Whether launches go to a tensor's device now."""
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()


def padded(size: int) -> int:
    """The side of a tile for so many rows or columns: a power of two, and products need 16."""
    return max(16, 1 << (size - 1).bit_length())


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes an operator of a function that allocates its outcome and runs kernels.

    The function has its arguments' types spelled out for torch, and runs what `wrap_triton` gives.
    It is the operator's fake too.
    """
    if not INTERPRETED:
        return torch.library.triton_op(name, mutates_args=())

    # There is nothing to compile in what the interpreter runs.
    def opaque(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(name, function, mutates_args=())
        made.register_fake(function)
        return made

    return opaque


def wrap_triton(launcher: Launcher) -> Run:
    """What runs a kernel inside an operator, where tensors may be those of a graph in the making.

    It has the name of torch's own, of which torch looks for calls in the source of an operator:
    compiled code that it kept is out of date when a kernel that it finds so has changed.
    """
    if INTERPRETED:
        return lambda *args: None if isinstance(args[1][0], FakeTensor) else launcher(*args)
    kernel: Any = torch.library.wrap_triton(launcher.fn)
    if kernel is launcher.fn:
        # The operator is called as it is.
        return launcher

    def run(grid: Any, tensors: Any, numbers: Any, fixed: Any) -> None:
        kernel[grid](*tensors, *numbers, *fixed, **launcher.options)

    return run
