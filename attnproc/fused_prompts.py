"""Image prompts by fused kernels, where they can stand in for the composed parts.

What the parts are decides: the automatic kernel, tensors on a GPU, no gradients. Everything else
goes the composed way.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, is_grad_enabled

from .kernels import triton
from .kernels.base import Kernel
from .kernels.fusing import fusable
from .kernels.plan import automatic
from .kernels.tuned import is_tuned
from .types import Branch, KernelCall, Scoring

__all__ = ["attended", "attended_beside"]

# Up to so many elements of a head's keys one launch for a text and prompts takes the GPU less time
# than two and a sum; so it does up to so many channels a head.
_ELEMENTS, _CHANNELS = 1 << 14, 128


def attended(
    branches: Sequence[Branch], q: Tensor, kernel: KernelCall, scoring: Scoring
) -> Tensor | None:
    """The weighted sum ``[B, S, H*D]`` of attention to each branch; None where no kernel can."""
    if is_grad_enabled() or not fusable(q) or isinstance(scoring.scale, Tensor):
        return None
    # By its function, since compiled code would check all that a kernel is.
    if not isinstance(kernel, Kernel) or kernel.run is not automatic or is_tuned(q):
        return None
    return triton.branches.attended(q, branches, scoring.scale)


def attended_beside(
    branches: Sequence[Branch],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: KernelCall,
    scoring: Scoring,
) -> Tensor | None:
    """As `attended`, plus attention to keys ``[B, H, K, D]`` as the scoring says."""
    if k.shape[3] > _CHANNELS or k.shape[2] * k.shape[3] > _ELEMENTS:
        return None
    if not scoring.only_causal or scoring.causal or scoring.dropout:
        return None
    return attended([(k, v, 1.0), *branches], q, kernel, scoring)
