"""Kernels by name, and the choice between the recipe's and the one set on a processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Kernel, named, register_kernel, registered
from .external import NPU, XLA, XFORMERS
from .linear import RELU_ADAPTIVE, RELU_LINEAR
from .native import CUDNN, EFFICIENT, FLASH, MATH, SDPA
from .reference import REFERENCE

if TYPE_CHECKING:
    from ..processor import Processor

__all__ = [
    "CUDNN",
    "EFFICIENT",
    "FLASH",
    "MATH",
    "NPU",
    "REFERENCE",
    "RELU_ADAPTIVE",
    "RELU_LINEAR",
    "SDPA",
    "XFORMERS",
    "XLA",
    "Kernel",
    "choose",
    "named",
    "register_kernel",
    "registered",
]

for _kernel in (REFERENCE, SDPA, FLASH, CUDNN, EFFICIENT, MATH, XFORMERS, NPU, XLA):
    register_kernel(_kernel)


def choose(kernel: Kernel, proc: Processor) -> Kernel:
    """The kernel set on the processor by name, else the recipe's.

    Linear attention is another function than softmax attention, so no name replaces it.
    """
    name = proc._attention_backend
    return kernel if name is None or kernel.linear else named(name)
