"""A mask over keys as further channels of queries and keys: exact, and without a mask.

A mask takes torch's kernels off their fast path, while their tiles have room for more channels
than most heads have. In these every query holds a large number, and a hidden key the same with a
minus, which takes its score so far down that its weight comes out as zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..types import Keys, Scoring
from .lse import backend_of

__all__ = ["by_channel", "worth_a_channel"]

# Channels come in steps of this many, up to this many a head.
_STEP, _MOST = 8, 128
# Scores of a call below which the copies of queries and keys take more time than the mask does.
_FEWEST = 1 << 22
# Its square, eight times, is finite in bfloat16 and float32.
_FAR = 2.0**60


def worth_a_channel(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether a mask over keys goes faster as channels; no gradients go through them."""
    if not isinstance(scoring.mask, Keys) or not q.is_cuda:
        return False
    if scoring.causal or scoring.window is not None or scoring.mods or scoring.dropout:
        return False
    dim, tokens = q.shape[3], q.shape[0] * q.shape[2]
    if q.dtype != torch.bfloat16 or dim % _STEP or dim + _STEP > _MOST:
        return False
    if tokens * k.shape[2] < _FEWEST or isinstance(scoring.scale, Tensor):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    # It alone takes values of another width fast.
    dims, group = (dim + _STEP, v.shape[3]), q.shape[1] // k.shape[1]
    return backend_of("cuda", q.dtype, dims, group, False) == SDPBackend.CUDNN_ATTENTION.value


def by_channel(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention ``[B, H, Q, D]`` under a mask over keys alone; zero where it hides all of them."""
    assert isinstance(scoring.mask, Keys)
    assert not isinstance(scoring.scale, Tensor)
    valid = scoring.mask.valid
    hides = torch.where(valid, 0.0, -_FAR).to(k.dtype)[:, :, None, None]  # [B|1, K, 1, 1]
    # Where all keys are hidden, all scores are alike and finite: of values that are zero.
    some = valid.any(dim=-1)[:, None, None, None]
    # In the order of memory and of whole tensors: torch's join takes three times as long else.
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    wide_q = torch.cat((q, q.new_full((*q.shape[:3], _STEP), _FAR)), dim=-1)
    wide_k = torch.cat((k, hides.expand(*k.shape[:3], _STEP).contiguous()), dim=-1)
    return F.scaled_dot_product_attention(
        wide_q.transpose(1, 2),
        wide_k.transpose(1, 2),
        torch.where(some, v, 0.0),
        scale=q.shape[3] ** -0.5 if scoring.scale is None else scoring.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
