"""Further attention for the perturbed rows of `Perturbed`, beside identity and blurred maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guidance import Blur, blurred
from ..places import grid_of, side
from ..types import AroundPart, KernelCall, Positional, Scoring
from .strength import Strength, mixed, now

__all__ = ["BlurredQueries", "Fading", "Nearby"]


@dataclass(frozen=True)
class BlurredQueries(Blur):
    """Attention whose scores are blurred over the queries' grid (smoothed energy guidance).

    Scores are linear in the queries, so these are blurred in place of a map. In a joint sequence
    the image's queries alone are.

    Args:
        sigma: Standard deviation in tokens; infinity is the mean of all queries.
        aspect: Height of the grid divided by its width.

    Source: https://arxiv.org/abs/2408.00760
    """

    sigma: float = math.inf

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        at = side("image", scoring.image, q.shape[2])
        image = q[:, :, at.start : at.stop]
        if math.isinf(self.sigma):
            image = image.mean(dim=2, keepdim=True).expand_as(image)
        else:
            image = blurred(image, self.sigma, self.aspect)
        q = torch.cat((q[:, :, : at.start], image, q[:, :, at.stop :]), dim=2)
        return kernel(q, k, v, scoring)


@dataclass(frozen=True)
class Fading:
    """A perturbation by strength; where there is none, perturbed rows guide by nothing.

    Args:
        perturb: The perturbation.
        strength: From 0, none, to 1, with outputs mixed between them; also a tensor or a
            `Schedule`.
    """

    perturb: AroundPart
    strength: Strength

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        strength = now(self.strength)
        steady = not isinstance(strength, Tensor)
        if steady and strength == 0:
            return kernel(q, k, v, scoring)
        o = self.perturb(kernel, q, k, v, scoring)
        if steady and strength == 1:
            return o
        return mixed(kernel(q, k, v, scoring), o, strength)


@dataclass(frozen=True)
class Nearby:
    """Attention where tokens of the image see a window around them and all of the text.

    A short range of sight in place of a crop of the picture, after sliding window guidance.

    Args:
        radius: How many tokens to each side.
        aspect: Height of the grid divided by its width.

    Source: https://arxiv.org/abs/2411.10257
    """

    radius: int = 2
    aspect: float = 1.0

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"radius is {self.radius}, possible are numbers from 0 on")

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        rows = side("image", scoring.image, q.shape[2])
        cols = side("image", scoring.image_keys, k.shape[2])
        width = grid_of(len(rows), self.aspect)[1]
        near = _Near(self.radius, width, len(rows), rows.start, cols.start)
        return kernel(q, k, v, scoring.but(mods=(*scoring.mods, near)))


@dataclass(frozen=True, eq=False)
class _Near(Positional):
    radius: int
    width: int
    tokens: int
    first_query: int
    first_key: int

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = i - self.first_query, j - self.first_key
        both = (i >= 0) & (i < self.tokens) & (j >= 0) & (j < self.tokens)
        rows = (i // self.width - j // self.width).abs() <= self.radius
        cols = (i % self.width - j % self.width).abs() <= self.radius
        return ~both | (rows & cols)
