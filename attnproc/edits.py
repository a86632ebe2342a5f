"""Changes to keys and values ``[B, H, K, D]`` between the prologue and the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .schedules import Schedule
from .shapes import for_rows
from .types import Arranged, Site

__all__ = ["FirstFrame", "detach_first_token"]


@dataclass(frozen=True)
class FirstFrame:
    """Every frame of a video sees the first frame's keys and values in place of its own.

    The text's keys and values stay: in a joint sequence the image's alone change, in cross
    attention none.

    Args:
        batch_size: How many videos the batch ``[videos * frames, ...]`` holds.
        strength: From 0, their own keys and values, to 1; between them a mixture. Also a tensor
            or a `Schedule`.

    Source: https://arxiv.org/abs/2303.13439
    """

    batch_size: int
    strength: float | Tensor | Schedule = 1.0
    name: ClassVar[str] = "cross_frame"

    def __call__(
        self, at: Site, arranged: Arranged, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        text, batch = arranged.text_keys, arranged.q.shape[0]
        if at.call.context is not None and text in (0, k.shape[2]):
            return k, v
        if batch % self.batch_size:
            raise ValueError(
                f"hidden_states has a batch of {batch}, which batch_size={self.batch_size} "
                "videos do not divide"
            )
        if k.shape[0] < batch:
            # They are of the first frames already.
            return k, v
        strength = self._strength()
        steady = not isinstance(strength, Tensor)
        if steady and strength == 0:
            return k, v
        first = [self._first_of_image(t, text, at.recipe.text_first) for t in (k, v)]
        if not (steady and strength == 1):
            first = [t + strength * (f - t) for t, f in zip((k, v), first, strict=True)]
        return first[0], first[1]

    def shown(self, batch: int) -> slice:
        """The rows of the batch that all see in place of their own, if that is all they see."""
        strength = self._strength()
        if isinstance(strength, Tensor) or strength != 1 or batch % self.batch_size:
            return slice(None)
        return slice(None, None, batch // self.batch_size)

    def _strength(self) -> float | Tensor:
        return self.strength.now() if isinstance(self.strength, Schedule) else self.strength

    def _first_of_image(self, t: Tensor, text: int, text_first: bool) -> Tensor:
        if not text:
            return self._first(t)
        if text_first:
            return torch.cat((t[:, :, :text], self._first(t[:, :, text:])), dim=2)
        image = t.shape[2] - text
        return torch.cat((self._first(t[:, :, :image]), t[:, :, image:]), dim=2)

    def _first(self, t: Tensor) -> Tensor:
        return for_rows(t[:: t.shape[0] // self.batch_size], t.shape[0])


def detach_first_token(
    at: Site, arranged: Arranged, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """With a context no gradient flows to the first key and value (Custom Diffusion)."""
    if at.call.context is None or not torch.is_grad_enabled():
        return k, v
    return _detached(k), _detached(v)


def _detached(t: Tensor) -> Tensor:
    return torch.cat((t[:, :, :1].detach(), t[:, :, 1:]), dim=2)
