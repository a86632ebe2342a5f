"""Output and log-sum-exp by one call of torch's own kernels, which have the latter anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..tracing import constant
from ..types import Scoring

__all__ = ["backend_of", "gives_lse", "with_lse"]

# Tokens of the call that torch is asked about.
_PROBE = 256


def gives_lse(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether torch may give it: nothing but causality masks, and nobody wants gradients.

    Nor does it where it would pad or repeat heads first.
    """
    if not scoring.only_causal or q.device.type not in ("cpu", "cuda"):
        return False
    if q.shape[:2] != k.shape[:2] or q.shape[3] % 8 or q.shape[3] != v.shape[3]:
        return False
    if scoring.dropout or isinstance(scoring.scale, Tensor):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)))


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Output ``[B, H, Q, D]``, to the bit that of `sdpa`, and log-sum-exp ``[B, H, Q]``.

    Args:
        q: ``[B, H, Q, D]``, as `k` and `v` for which `gives_lse`.
        k: Keys.
        v: Values.
        scoring: Causality and scale.
        bias: Added to the scores, ``[B, H, Q, K]``.

    Returns:
        None where the implementation that torch takes does not give them.
    """
    aten: Any = torch.ops.aten
    causal, scale = scoring.causal, scoring.scale
    backend = _backend(q, k, v, scoring)
    if backend == SDPBackend.FLASH_ATTENTION.value and q.device.type == "cpu":
        op = aten._scaled_dot_product_flash_attention_for_cpu
        return op(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if backend == SDPBackend.FLASH_ATTENTION.value and bias is None:
        op = aten._scaled_dot_product_flash_attention
        return op(q, k, v, 0.0, causal, False, scale=scale)[:2]
    if backend == SDPBackend.CUDNN_ATTENTION.value:
        op = aten._scaled_dot_product_cudnn_attention
        o, lse = op(q, k, v, bias, True, 0.0, causal, False, scale=scale)[:2]
        return o, lse.reshape(q.shape[:3])
    if backend == SDPBackend.EFFICIENT_ATTENTION.value and bias is None:
        op = aten._scaled_dot_product_efficient_attention
        o, lse = op(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        # It has rows up to a multiple of 32.
        return o, lse[:, :, : q.shape[2]]
    return None


def _backend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> int:
    """Which implementation torch takes."""
    if torch.compiler.is_compiling():
        return backend_of(q.device.type, q.dtype, (q.shape[3], v.shape[3]), 1, scoring.causal)
    choice: Any = torch._fused_sdp_choice  # pyright: ignore
    return choice(q, k, v, None, 0.0, scoring.causal, scale=scoring.scale)


@constant
def backend_of(
    device: str, dtype: torch.dtype, dims: tuple[int, int], group: int, causal: bool
) -> int:
    """Which implementation torch takes for calls of a kind, whatever the number of tokens.

    Args:
        device: Its type.
        dtype: Of queries, keys and values.
        dims: Channels a head of queries and keys, and of values.
        group: Query heads to a key head.
        causal: Whether the call is causal.
    """
    q, k, v = (
        torch.empty(1, heads, _PROBE, dim, device=device, dtype=dtype)
        for heads, dim in ((group, dims[0]), (1, dims[0]), (1, dims[1]))
    )
    choice: Any = torch._fused_sdp_choice  # pyright: ignore
    return choice(q, k, v, None, 0.0, causal, enable_gqa=group > 1)
