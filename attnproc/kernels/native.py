"""torch's scaled dot product attention: as torch chooses, or pinned to one implementation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..types import Scoring
from .base import Kernel
from .reference import dense_mask

__all__ = ["CUDNN", "EFFICIENT", "FLASH", "MATH", "SDPA", "sdpa"]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; it accumulates scores in float32."""
    mask = dense_mask(scoring, q, k) if scoring.mask is not None else None
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=scoring.causal and mask is None,
        scale=scoring.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def pinned(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, backend: SDPBackend) -> Tensor:
    """`sdpa` by one implementation alone; torch raises where it can't take the call."""
    with sdpa_kernel(backend):
        return sdpa(q, k, v, scoring)


SDPA = Kernel("sdpa", sdpa)
FLASH = Kernel("flash_sdpa", pinned, (SDPBackend.FLASH_ATTENTION,))
CUDNN = Kernel("cudnn", pinned, (SDPBackend.CUDNN_ATTENTION,))
EFFICIENT = Kernel("efficient", pinned, (SDPBackend.EFFICIENT_ATTENTION,))
MATH = Kernel("math", pinned, (SDPBackend.MATH,))
