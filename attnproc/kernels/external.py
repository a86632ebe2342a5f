"""Kernels of other packages that need hardware of their own, imported on first use.

Untested on their devices: the adapters' arguments, layouts and mask polarity are tested against
recorded stand-ins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Scoring
from .base import Kernel, package
from .native import sdpa
from .reference import expand_heads, factor
from .takes import HALF, Takes
from .visible import dense_mask, filled

__all__ = ["NPU", "STRICT", "XFORMERS", "XLA", "npu", "xformers", "xla"]

_FLASH_TOKENS = 4096
_ALL_TOKENS = 65536

Partition = tuple[str | None, ...] | None


def xformers(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, op: object = None) -> Tensor:
    """`xformers.ops.memory_efficient_attention`, by the operator `op` or its own choice."""
    ops = package("xformers.ops", "pip install xformers")
    k, v = expand_heads(k, q), expand_heads(v, q)
    mask, some = _filled(scoring, q, k)
    bias = _additive(mask, q)
    if bias is not None:
        # xformers broadcasts nothing, and wants rows that start at multiples of 16 bytes.
        bias = F.pad(bias, (0, -bias.shape[-1] % 8))[..., : bias.shape[-1]]
        bias = bias.expand(*q.shape[:3], -1)
    tokens_first = (t.transpose(1, 2) for t in (q, k, v))
    o = ops.memory_efficient_attention(
        *tokens_first, attn_bias=bias, p=scoring.dropout, op=op, scale=scoring.scale
    )
    return _without(o.transpose(1, 2), some)


def npu(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`torch_npu.npu_fusion_attention`."""
    module = package("torch_npu", "pip install torch_npu")
    scale = factor(q, scoring)
    mask, some = _filled(scoring, q, k)
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
    o = module.npu_fusion_attention(
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
        keep_prob=1.0 - scoring.dropout,
        sync=False,
        inner_precise=0,
    )[0]
    return _without(o, some)


def npu_in_half(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`npu` in half precision; `sdpa` in float32, as diffusers' class has it."""
    run = npu if q.dtype in HALF else sdpa
    if run is sdpa:
        package("torch_npu", "pip install torch_npu")
    return run(q, k, v, scoring)


def xla(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, partition_spec: Partition = None
) -> Tensor:
    """torch_xla's Pallas flash attention."""
    module = package("torch_xla.experimental.custom_kernel", "pip install torch_xla")
    k, v = expand_heads(k, q), expand_heads(v, q)
    scale = factor(q, scoring)
    causal = scoring.causal and scoring.only_causal
    mask, some = (None, None) if causal else _filled(scoring, q, k)
    bias = _additive(mask, q)
    if bias is not None:
        # The kernel scales the bias with the scores.
        bias = (bias / scale).expand(*q.shape[:3], -1)
    o = module.flash_attention(
        q,
        k,
        v,
        causal=causal,
        sm_scale=scale,
        ab=bias,
        partition_spec=partition_spec,
    )
    return _without(o, some)


def xla_from_4096(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, partition_spec: Partition = None
) -> Tensor:
    """`xla` from 4096 tokens on; `sdpa` below, as diffusers' class has it."""
    if min(q.shape[2], k.shape[2]) >= _FLASH_TOKENS:
        return xla(q, k, v, scoring, partition_spec)
    package("torch_xla.experimental.custom_kernel", "pip install torch_xla")
    return sdpa(q, k, v, scoring)


def _filled(scoring: Scoring, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The dense mask with empty rows opened, and which are not empty."""
    mask = dense_mask(scoring, q, k)
    return (None, None) if mask is None else filled(mask)


def _without(o: Tensor, some: Tensor | None) -> Tensor:
    return o if some is None else o.masked_fill(~some, 0.0)


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask as a bias of the dtype of `q`."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)


_FLOATS = (*HALF, torch.float32)
_TAKES_NPU = Takes(
    devices=("npu",),
    dtypes=_FLOATS,
    dims=(16, 512, 16),
    dropout=True,
    needs="torch_npu",
    install="pip install torch_npu",
)
_TAKES_XLA = Takes(
    devices=("xla",),
    dtypes=_FLOATS,
    needs="torch_xla",
    install="pip install torch_xla",
)
XFORMERS = Kernel(
    "xformers",
    xformers,
    (None,),
    takes=Takes(
        devices=("cuda",),
        dtypes=_FLOATS,
        dropout=True,
        deterministic=False,
        traceable=False,
        needs="xformers",
        install="pip install xformers",
    ),
)
NPU = Kernel("npu", npu_in_half, takes=_TAKES_NPU)
XLA = Kernel("xla", xla_from_4096, (None,), takes=_TAKES_XLA)
STRICT = (XFORMERS, Kernel("npu", npu, takes=_TAKES_NPU), Kernel("xla", xla, takes=_TAKES_XLA))
"""What the names stand for; the classes of diffusers fall back where these don't."""
