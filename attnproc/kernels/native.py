"""torch's scaled dot product attention: as torch chooses, or pinned to one implementation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..types import Scoring
from .base import Kernel
from .reference import expand_heads
from .takes import HALF, KINDS, Ask, Takes
from .visible import dense_mask

__all__ = ["BOUNDED", "CUDNN", "EFFICIENT", "FLASH", "MATH", "SDPA", "sdpa"]


BOUNDED = ("cpu", "cuda")
"""Where torch never takes the whole matrix of scores for single and half precision."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; it accumulates scores in float32."""
    q, scale = scoring.scaled(q)
    plain = scoring.only_causal
    mask = None if plain else dense_mask(scoring, q, k)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    elif mask is not None and not q.is_cpu:
        # Of torch's kernels cuDNN alone makes NaN of a row without keys, and only of a bool mask.
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=scoring.dropout,
        is_causal=plain and scoring.causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def pinned(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, backend: SDPBackend, expand: bool = False
) -> Tensor:
    """`sdpa` by one implementation alone; torch raises where it can't take the call."""
    if expand:
        k, v = expand_heads(k, q), expand_heads(v, q)
    with sdpa_kernel(backend):
        return sdpa(q, k, v, scoring)


def _flash(asked: Ask) -> str | None:
    if asked.device == "cpu":
        if asked.dropout:
            return "dropout: on a CPU it has none"
        return "a learned bias: it gives no gradient" if "learned" in asked.kinds else None
    if asked.kinds - {"causal"}:
        return f"mask {' & '.join(sorted(asked.kinds))}: on {asked.device} it takes causal alone"
    if asked.ragged:
        return f"causal with {asked.queries} queries and {asked.keys} keys: they must be as many"
    if asked.dtype not in HALF or asked.dim > 256:
        return f"on {asked.device} it takes float16 or bfloat16 and at most 256 channels a head"
    return None


def _aligned(asked: Ask) -> str | None:
    step = 8 if asked.dtype in HALF else 4
    if asked.dim % step or asked.v_dim % step:
        return f"{asked.dim} channels a head: {asked.dtype} needs a multiple of {step}"
    return None


def _many_keys(asked: Ask) -> str | None:
    return "1 key: it needs more" if asked.keys == 1 else None


SDPA = Kernel("sdpa", sdpa, takes=Takes(dropout=True), bounded=BOUNDED)
_FUSED = Takes(devices=("cuda",), any_v=False, dropout=True, deterministic=False)
_CUDNN = replace(_FUSED, dtypes=HALF, dims=(8, 128, 8), masks=KINDS - {"learned"}, also=_many_keys)
_EFFICIENT = replace(_FUSED, dtypes=(*HALF, torch.float32), any_v=True, also=_aligned)
FLASH = Kernel(
    "flash_sdpa",
    pinned,
    (SDPBackend.FLASH_ATTENTION,),
    takes=replace(_FUSED, devices=("cpu", "cuda"), also=_flash),
)
CUDNN = Kernel("cudnn", pinned, (SDPBackend.CUDNN_ATTENTION, True), takes=_CUDNN)
EFFICIENT = Kernel("efficient", pinned, (SDPBackend.EFFICIENT_ATTENTION, True), takes=_EFFICIENT)
MATH = Kernel("math", pinned, (SDPBackend.MATH,), takes=Takes(dropout=True))
