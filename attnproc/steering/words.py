"""Word weights: how much each word of the prompt says."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..rows import part_rows
from ..types import Arranged, Site
from .strength import Strength, now

__all__ = ["WordWeights"]


@dataclass(frozen=True)
class WordWeights:
    """Multiplies what chosen words give to the picture.

    The columns of these words in the attention map are multiplied, as prompt-to-prompt's
    re-weighting does. The values are in place of the map, which comes to the same: no map is made,
    and any kernel runs. A weight below 0 takes away from the picture what the word would add.

    Args:
        weights: Token positions in the prompt, each with its factor.
        part: Which of how many equal parts of the batch is steered: the second of two is the
            conditional half under classifier-free guidance, (0, 1) all of it.
        strength: From 0, no change, to 1; also a tensor or a `Schedule`.

    Source: https://arxiv.org/abs/2208.01626
    """

    weights: tuple[tuple[int, float], ...]
    part: tuple[int, int] = (1, 2)
    strength: Strength = 1.0
    name: ClassVar[str] = "words"

    def __call__(
        self, at: Site, arranged: Arranged, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        strength = now(self.strength)
        text = arranged.text_keys or (v.shape[2] if at.call.context is not None else 0)
        if not text or (not isinstance(strength, Tensor) and strength == 0):
            return k, v
        _check(self.weights, text)
        start = 0 if at.recipe.text_first else v.shape[2] - text
        made = _factors if torch.compiler.is_compiling() else _kept_factors
        factors = made(self.weights, start, v.shape[2], v.dtype, v.device)  # [K, 1]
        rows = part_rows(self.part, v.shape[0])
        steered = v[rows.start : rows.stop] * (1 + strength * (factors - 1)).to(v.dtype)
        return k, torch.cat((v[: rows.start], steered, v[rows.stop :]))


def _check(weights: tuple[tuple[int, float], ...], text: int) -> None:
    outside = [i for i, _ in weights if not 0 <= i < text]
    if outside:
        raise ValueError(f"weights has positions {outside}, the prompt has tokens 0 to {text - 1}")


def _factors(
    weights: tuple[tuple[int, float], ...],
    start: int,
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A factor a key ``[K, 1]``."""
    factors = [1.0] * keys
    for position, weight in weights:
        factors[start + position] = weight
    return torch.tensor(factors, dtype=dtype, device=device)[:, None]


_kept_factors = functools.lru_cache(maxsize=64)(_factors)
