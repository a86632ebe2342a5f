"""A kernel for attnproc in a package of its own: one head at a time, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from attnproc.kernels import Kernel, Takes
from attnproc.kernels.reference import expand_heads, factor
from attnproc.kernels.visible import values
from attnproc.types import Scoring

__all__ = ["HEAD_BY_HEAD"]


def head_by_head(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention of ``[B, H, Q, D]`` to ``[B, H', K, D]``, the scores of one head at a time."""
    k, v = expand_heads(k, q), expand_heads(v, q)
    mask, scale = values(scoring), factor(q, scoring)
    heads = []
    for h in range(q.shape[1]):
        scores = (q[:, h] @ k[:, h].transpose(-1, -2)).float() * scale  # [B, Q, K]
        if mask is not None:
            # The record below says that keys are all that can be masked: [B, 1, 1, K].
            scores = scores.masked_fill(~mask[:, 0], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, 0], 0)
        heads.append(weights.to(v.dtype) @ v[:, h])
    return torch.stack(heads, dim=1)


HEAD_BY_HEAD = Kernel(
    "head_by_head",
    head_by_head,
    # Everything that is not said here is refused before the kernel is called, by name.
    takes=Takes(masks=frozenset({"keys"})),
)
