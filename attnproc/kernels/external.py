"""Kernels of other packages, imported on first use.

Untested on their devices: the adapters' arguments, layouts and mask polarity are tested against
recorded stand-ins.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Scoring
from .base import Kernel
from .native import sdpa
from .reference import dense_mask, expand_heads

__all__ = ["NPU", "XFORMERS", "XLA", "npu", "xformers", "xla"]

_FLASH_TOKENS = 4096
_ALL_TOKENS = 65536


def xformers(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, op: Any = None) -> Tensor:
    """`xformers.ops.memory_efficient_attention`, by the operator `op` or its own choice."""
    ops = _package("xformers.ops", "pip install xformers")
    k, v = expand_heads(k, q), expand_heads(v, q)
    bias = _additive(dense_mask(scoring, q, k), q)
    if bias is not None:
        # xformers broadcasts nothing, and wants rows that start at multiples of 16 bytes.
        bias = F.pad(bias, (0, -bias.shape[-1] % 8))[..., : bias.shape[-1]]
        bias = bias.expand(*q.shape[:3], -1)
    tokens_first = (t.transpose(1, 2) for t in (q, k, v))
    o = ops.memory_efficient_attention(*tokens_first, attn_bias=bias, op=op, scale=scoring.scale)
    return o.transpose(1, 2)


def npu(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`torch_npu.npu_fusion_attention` in half precision; `sdpa` in float32, as it takes none."""
    package = _package("torch_npu", "pip install torch_npu")
    if q.dtype not in (torch.float16, torch.bfloat16):
        return sdpa(q, k, v, scoring)
    scale = _scale(q, scoring)
    mask = dense_mask(scoring, q, k)
    bias, blocked = None, None
    if mask is not None and mask.dtype == torch.bool:
        blocked = ~mask
    elif mask is not None:
        blocked = mask == -torch.inf
        # The kernel scales the bias with the scores.
        bias = (mask.masked_fill(blocked, 0) / scale).to(q.dtype)
        bias = bias.expand(*q.shape[:3], -1).contiguous()
    if blocked is not None:
        blocked = blocked.expand(q.shape[0], -1, q.shape[2], -1).contiguous()
    return package.npu_fusion_attention(
        q,
        k,
        v,
        q.shape[1],
        input_layout="BNSD",
        pse=bias,
        atten_mask=blocked,
        scale=scale,
        pre_tockens=_ALL_TOKENS,
        next_tockens=_ALL_TOKENS,
        keep_prob=1.0,
        sync=False,
        inner_precise=0,
    )[0]


def xla(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, partition_spec: tuple | None = None
) -> Tensor:
    """torch_xla's Pallas flash attention from 4096 tokens on; `sdpa` below."""
    package = _package("torch_xla.experimental.custom_kernel", "pip install torch_xla")
    if min(q.shape[2], k.shape[2]) < _FLASH_TOKENS:
        return sdpa(q, k, v, scoring)
    k, v = expand_heads(k, q), expand_heads(v, q)
    scale = _scale(q, scoring)
    bias = _additive(dense_mask(scoring._replace(causal=False), q, k), q)
    if bias is not None:
        # The kernel scales the bias with the scores.
        bias = (bias / scale).expand(*q.shape[:3], -1)
    return package.flash_attention(
        q,
        k,
        v,
        causal=scoring.causal,
        sm_scale=scale,
        ab=bias,
        partition_spec=partition_spec,
    )


def _scale(q: Tensor, scoring: Scoring) -> float | Tensor:
    return q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask as a bias of the dtype of `q`."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)


def _package(module: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"this kernel needs {package}, which is not here: {install}") from error


XFORMERS = Kernel("xformers", xformers, (None,))
NPU = Kernel("npu", npu)
XLA = Kernel("xla", xla, (None,))
