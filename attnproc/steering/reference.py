"""Reference attention: pictures that look at another one while they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import joined
from ..places import side
from ..rows import rows_from
from ..types import Bias, KernelCall, Keys, Mask, Scoring
from .passing import unobserved
from .strength import Strength, mixed, now

__all__ = ["SharedKeys"]


@dataclass(frozen=True)
class SharedKeys:
    """Lets every picture of a batch see the keys and values of the first.

    For self attention, or the image's part of joint attention. The first picture, such as a noised
    photograph, does not change.

    Args:
        mode: "append" shows them beside the picture's own, "replace" in place of those.
        parts: The batch is this many equal parts, each with a first picture of its own: 2 under
            classifier-free guidance, else 1.
        normed: Whether queries and keys take the mean and spread of the first picture's, which
            evens out how much is looked at it.
        strength: From 0, no sharing, to 1. Appended keys count as that many each; for larger
            numbers they weigh more. Also a tensor or a `Schedule`.

    Sources: https://arxiv.org/abs/2312.02133 (append, normed),
        https://arxiv.org/abs/2304.08465 (replace)
    """

    mode: Literal["append", "replace"] = "append"
    parts: int = 2
    normed: bool = False
    strength: Strength = 1.0
    name: ClassVar[str] = "reference"

    def __post_init__(self) -> None:
        if self.mode not in ("append", "replace"):
            raise ValueError(f"mode is {self.mode!r}, possible are 'append' and 'replace'")

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        strength, batch = now(self.strength), q.shape[0]
        if batch % self.parts:
            raise ValueError(f"hidden_states has a batch of {batch}: parts is {self.parts}")
        each = batch // self.parts
        if (not isinstance(strength, Tensor) and strength == 0) or each < 2:
            return kernel(q, k, v, scoring)
        first = [i - i % each for i in range(batch)]
        image = side("image", scoring.image_keys, k.shape[2])

        own_q, own_k = q, k
        if self.normed:
            rows = side("image", scoring.image, q.shape[2])
            q, k = _as_first(q, rows, first), _as_first(k, image, first)
        shared_k, shared_v = (rows_from(t[:, :, image.start : image.stop], first) for t in (k, v))
        if self.mode == "replace":
            new_k, new_v = _put(k, shared_k, image), _put(v, shared_v, image)
            o = kernel(q, new_k, new_v, scoring)
            if not isinstance(strength, Tensor) and strength == 1:
                return o
            return mixed(unobserved(kernel)(own_q, own_k, v, scoring), o, strength)
        scoring = _widened(scoring, strength, image, k, first)
        k, v = torch.cat((k, shared_k), dim=2), torch.cat((v, shared_v), dim=2)
        return kernel(q, k, v, scoring)


def _as_first(t: Tensor, image: range, first: list[int]) -> Tensor:
    """The image's tokens with the mean and spread of the first picture's, by channel."""
    some = t[:, :, image.start : image.stop]
    mean, spread = some.mean(dim=2, keepdim=True), some.std(dim=2, keepdim=True) + 1e-5
    normed = (some - mean) / spread * rows_from(spread, first) + rows_from(mean, first)
    return _put(t, normed, image)


def _put(t: Tensor, image: Tensor, at: range) -> Tensor:
    return torch.cat((t[:, :, : at.start], image, t[:, :, at.stop :]), dim=2)


def _widened(
    scoring: Scoring, strength: float | Tensor, image: range, k: Tensor, first: list[int]
) -> Scoring:
    """The scoring with columns for keys of the first picture behind all others."""
    if scoring.causal or scoring.window is not None or scoring.mods:
        raise ValueError(
            "attention_mask is one of positions (causal, window or blocks), which has no place "
            "for the keys of a reference"
        )
    mask = None if scoring.mask is None else _wider(scoring.mask, image, first)
    if isinstance(strength, Tensor) or strength != 1:
        weight = torch.as_tensor(strength, dtype=torch.float32, device=k.device)
        bias = torch.cat((k.new_zeros(k.shape[2]), weight.log().to(k.dtype).expand(len(image))))
        mask = joined(mask, Bias(bias[None, None, None]))
    if scoring.image_keys is not None:
        # Seen twice, the first picture would outweigh its text.
        own = torch.tensor([row == i for i, row in enumerate(first)], device=k.device)
        second = torch.arange(k.shape[2] + len(image), device=k.device) >= k.shape[2]
        mask = joined(mask, Keys(~(own[:, None] & second)))
    keys = scoring.image_keys or (image.start, image.stop)
    return scoring.but(mask=mask, image_keys=keys)


def _wider(mask: Mask, image: range, first: list[int]) -> Mask:
    """A mask with what the first picture's own keys have, for those that were put in."""
    values = mask[0]
    rows = first if values.shape[0] > 1 else [0]
    more = rows_from(values[..., image.start : image.stop], rows)
    return type(mask)(torch.cat((values, more), dim=-1))
