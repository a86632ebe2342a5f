"""Linear attention over ranks: each sums over its own keys, and the small sums are added up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn import functional as collectives

from ..kernels.reference import expand_heads
from ..types import Scoring
from .exchange import Axis, Lost, lost

__all__ = ["Reduced"]


@dataclass(frozen=True)
class Reduced:
    """`relu_linear` of own queries ``[B, H, S, D]`` and the keys of all ranks, without a mask.

    It takes the place of `relu_adaptive` too, which gives the same weights another way.

    Args:
        axis: The ranks.
    """

    axis: Axis

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        keys = F.relu(expand_heads(k, q)).to(wide)
        values = F.pad(expand_heads(v, q).to(wide), (0, 1), value=1.0)
        state = self._sum(keys.transpose(-1, -2) @ values)  # [B, H, D, D + 1]
        o = F.relu(q).to(wide) @ state
        return (o[..., :-1] / (o[..., -1:] + scoring.eps)).to(v.dtype)

    def _sum(self, state: Tensor) -> Tensor:
        try:
            return collectives.all_reduce(state.contiguous(), group=self.axis.group)
        except RuntimeError as error:
            raise Lost(lost(self.axis, error)) from error
