"""A kernel's output and its log-sum-exp by one call, where the kernel has the latter anyway.

With it the weights of a few keys cost their own scores alone, not those of all keys.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels import AUTO, SDPA, Kernel
from ..kernels.lse import gives_lse, with_lse
from ..kernels.tuned import is_tuned
from ..types import KernelCall, Scoring

__all__ = ["attended"]

_MANY_KEYS = 256
"""Below, the scores of all keys cost less than what is looked up here."""


def attended(
    kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """The output, the same to the bit as of the kernel call, and the log-sum-exp ``[B, H, Q]``.

    The latter is None where the implementation that torch takes does not give it.
    """
    if k.shape[2] >= _MANY_KEYS and _is_torch(kernel, q) and gives_lse(q, k, v, scoring):
        found = with_lse(q, k, v, scoring)
        if found is not None:
            return found
    return kernel(q, k, v, scoring), None


def _is_torch(kernel: KernelCall, q: Tensor) -> bool:
    # A wrapper is no kernel; compiled code can't compare the two.
    if not isinstance(kernel, Kernel) or kernel not in (AUTO, SDPA):
        return False
    return not (kernel is AUTO and is_tuned(q))
