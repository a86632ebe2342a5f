"""Second calls of a kernel within one wrapper."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..types import KernelCall

__all__ = ["unobserved"]


def unobserved(kernel: KernelCall) -> KernelCall:
    """A kernel call without what records maps around it: one call of a layer is one record."""
    call: Any = kernel
    if not (isinstance(call, partial) and hasattr(call.func, "name")):
        return call
    wrapper: Any = call.func
    if wrapper.name == "capture":
        return unobserved(call.args[0])
    return partial(wrapper, unobserved(call.args[0]))
