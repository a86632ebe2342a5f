"""Kernels by name, what they take, and the choice between them."""

from __future__ import annotations

from .base import GROUP, Kernel, named, register_kernel, registered
from .choice import choose, set_backend
from .chunked import CHUNKED
from .explanation import Explanation, explain
from .external import NPU, STRICT, XFORMERS, XLA
from .flash import FLASH2, FLASH3, FLASH4
from .flex import FLEX
from .functional import attention
from .fusing import use_fused
from .guard import Guard, Inaccurate
from .hub import HUB, use_hub
from .linear import RELU_ADAPTIVE, RELU_LINEAR
from .native import CUDNN, EFFICIENT, FLASH, MATH, SDPA
from .plan import AUTO, Refused
from .reference import REFERENCE
from .sage import SAGE
from .scope import backend
from .short import SHORT
from .takes import KINDS, Ask, Takes, ask, why_not
from .timing import Timing, Tuned, autotune
from .tuned import use_table
from .varlen import VARLEN

__all__ = [
    "AUTO",
    "CHUNKED",
    "CUDNN",
    "EFFICIENT",
    "FLASH",
    "FLASH2",
    "FLASH3",
    "FLASH4",
    "FLEX",
    "GROUP",
    "KINDS",
    "MATH",
    "NPU",
    "REFERENCE",
    "RELU_ADAPTIVE",
    "RELU_LINEAR",
    "SDPA",
    "SHORT",
    "VARLEN",
    "XFORMERS",
    "XLA",
    "Ask",
    "Explanation",
    "Guard",
    "Inaccurate",
    "Kernel",
    "Refused",
    "Takes",
    "Timing",
    "Tuned",
    "ask",
    "attention",
    "autotune",
    "backend",
    "choose",
    "explain",
    "named",
    "register_kernel",
    "registered",
    "set_backend",
    "use_fused",
    "use_hub",
    "use_table",
    "why_not",
]

_KERNELS = (
    *(AUTO, SDPA, FLASH, CUDNN, EFFICIENT, MATH, SHORT, VARLEN, FLEX, CHUNKED, REFERENCE),
    *(FLASH2, FLASH3, FLASH4, *SAGE, *STRICT, *HUB),
)
for _kernel in _KERNELS:
    register_kernel(_kernel)
