"""Whether fused Triton kernels may stand in for plain tensor operations."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch.compiler import is_compiling

from ..tracing import constant
from .takes import missing
from .triton import FILES

__all__ = [
    "INTERPRETED",
    "alike",
    "fusable",
    "is_autocast",
    "is_transformed",
    "is_wanted",
    "keeps_nothing",
    "use_fused",
    "withheld",
]

# Not part of torch's typed interface.
_TORCH: Any = torch

# Triton's interpreter runs the kernels on a CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_wanted = os.environ.get("ATTNPROC_FUSED", "1") != "0"
_imported: bool | None = None


def use_fused(wanted: bool) -> None:
    """Turns fused kernels on (as they are at first) or off, for the whole process.

    They compute what the composed operations compute, with fewer roundings. Off is for comparing,
    and for what they do not have: gradients of gradients. The environment variable
    ``ATTNPROC_FUSED=0`` does the same at the start.
    """
    global _wanted
    _wanted = wanted
    # Which kernel serves a call was worked out once for each kind.
    from .plan import forget

    forget()


def is_wanted() -> bool:
    """Whether fused kernels are turned on."""
    return _wanted


def fusable(x: Tensor) -> bool:
    """Whether a tensor is of a kind that the kernels take, and they are wanted and there."""
    if not (x.is_cuda or INTERPRETED) or not _wanted:
        return False
    # float16, bfloat16 and float32: compiled code would check each name of a list.
    if not x.is_floating_point() or x.dtype.itemsize not in (2, 4):
        return False
    return _there() and not is_transformed()


# A constant, as compiled code traces no imports.
@constant
def _there() -> bool:
    """Whether there is Triton; then the kernels are imported."""
    global _imported
    if _imported is None:
        _imported = missing("triton", "") is None
        for name in FILES if _imported else ():
            importlib.import_module(f".triton.{name}", __package__)
    return _imported


def withheld() -> bool:
    """Whether no kernel may run now, whatever the tensors are."""
    return not _wanted or is_transformed()


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where a tensor is."""
    # Making and reading the name of a device takes as long as a launch.
    return is_autocast_enabled() if x.is_cuda else is_autocast_enabled(x.device.type)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` may ask for gradients behind the tensors' backs."""
    return not is_compiling() and _TORCH._C._are_functorch_transforms_active()


def keeps_nothing() -> bool:
    """Whether nothing is kept for gradients or a graph, so that results may be changed."""
    return not is_grad_enabled() and not is_compiling()


def alike(weight: Any, x: Tensor) -> bool:
    """Whether a weight is an ordinary tensor of the dtype and on the device of `x`."""
    plain = weight.__class__ in (Tensor, nn.Parameter)
    return plain and weight.dtype is x.dtype and weight.get_device() == x.get_device()
