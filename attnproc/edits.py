"""Changes to keys and values ``[B, H, K, D]`` between the prologue and the kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .types import Site

__all__ = ["FirstFrame", "detach_first_token"]


@dataclass(frozen=True)
class FirstFrame:
    """In self attention every frame of a video sees the first frame's keys and values.

    Args:
        batch_size: How many videos the batch ``[videos * frames, ...]`` holds.

    Source: https://arxiv.org/abs/2303.13439
    """

    batch_size: int

    def __call__(self, at: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if at.call.context is not None:
            return k, v
        if k.shape[0] % self.batch_size:
            raise ValueError(
                f"hidden_states has a batch of {k.shape[0]}, which batch_size={self.batch_size} "
                "videos do not divide"
            )
        return self._first(k), self._first(v)

    def _first(self, t: Tensor) -> Tensor:
        frames = t.unflatten(0, (self.batch_size, -1))
        return frames[:, :1].expand_as(frames).flatten(0, 1)


def detach_first_token(at: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """In cross attention no gradient flows to the first key and value (Custom Diffusion)."""
    if at.call.context is None or not torch.is_grad_enabled():
        return k, v
    return _detached(k), _detached(v)


def _detached(t: Tensor) -> Tensor:
    return torch.cat((t[:, :, :1].detach(), t[:, :, 1:]), dim=2)
