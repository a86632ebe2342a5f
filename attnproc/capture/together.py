"""A kernel's output and its log-sum-exp by one call, where the kernel has the latter anyway.

With it the weights of a few keys cost their own scores alone, not those of all keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..kernels import AUTO, SDPA, Kernel
from ..kernels.native import only_causal
from ..kernels.takes import constant
from ..kernels.tuned import is_tuned
from ..types import KernelCall, Scoring

__all__ = ["attended"]

# Below, the scores of all keys cost less than what is looked up here.
_KEYS = 256


def attended(
    kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """The output, the same to the bit as of the kernel call, and the log-sum-exp ``[B, H, Q]``.

    The latter is None where the implementation that torch takes does not give it.
    """
    if not _plain(kernel, q, k, v, scoring):
        return kernel(q, k, v, scoring), None
    aten: Any = torch.ops.aten
    causal, scale = scoring.causal, scoring.scale
    backend = _backend(q, k, v, scoring)
    if backend == SDPBackend.FLASH_ATTENTION.value and q.device.type == "cpu":
        op = aten._scaled_dot_product_flash_attention_for_cpu
        return op(q, k, v, 0.0, causal, scale=scale)
    if backend == SDPBackend.FLASH_ATTENTION.value:
        op = aten._scaled_dot_product_flash_attention
        return op(q, k, v, 0.0, causal, False, scale=scale)[:2]
    if backend == SDPBackend.CUDNN_ATTENTION.value:
        op = aten._scaled_dot_product_cudnn_attention
        o, lse = op(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
        return o, lse.reshape(q.shape[:3])
    if backend == SDPBackend.EFFICIENT_ATTENTION.value:
        op = aten._scaled_dot_product_efficient_attention
        o, lse = op(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        # It has rows up to a multiple of 32.
        return o, lse[:, :, : q.shape[2]]
    return kernel(q, k, v, scoring), None


def _plain(kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether torch's own attention gets the call as it is, and pads nothing."""
    # A wrapper is no kernel; compiled code can't compare the two.
    if not isinstance(kernel, Kernel) or kernel not in (AUTO, SDPA):
        return False
    if k.shape[2] < _KEYS or not only_causal(scoring):
        return False
    if q.shape[:2] != k.shape[:2] or q.shape[3] % 8 or q.shape[3] != v.shape[3]:
        return False
    if scoring.dropout or isinstance(scoring.scale, Tensor):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return False
    return q.device.type in ("cpu", "cuda") and not (kernel is AUTO and is_tuned(q.device.type))


def _backend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> int:
    """Which implementation torch takes."""
    if torch.compiler.is_compiling():
        return _backend_of(q.device.type, q.dtype, q.shape[3], scoring.causal)
    choice: Any = torch._fused_sdp_choice  # pyright: ignore
    return choice(q, k, v, None, 0.0, scoring.causal, scale=scoring.scale)


@constant
def _backend_of(device: str, dtype: torch.dtype, dim: int, causal: bool) -> int:
    """The same, asked once while tracing: it does not depend on how many tokens there are."""
    probe = torch.empty(1, 1, _KEYS, dim, device=device, dtype=dtype)
    choice: Any = torch._fused_sdp_choice  # pyright: ignore
    return choice(probe, probe, probe, None, 0.0, causal)
