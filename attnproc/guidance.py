"""Other attention for the perturbed rows of `Perturbed`, beside the identity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import KernelCall, Scoring

__all__ = ["Blur", "BlurredMap", "blurred"]


@dataclass(frozen=True)
class Blur:
    """A blur over the grid of the image's tokens: `sigma` tokens wide, `aspect` high to wide."""

    sigma: float = 1.0
    aspect: float = 1.0

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise ValueError(f"sigma is {self.sigma}, possible are numbers above 0")


@dataclass(frozen=True)
class BlurredMap(Blur):
    """Attention whose map is blurred over the queries' grid by a Gaussian.

    A blur over queries commutes with the values, so the result is blurred in place of the map.
    In a joint sequence the image's queries alone are.

    Args:
        sigma: Standard deviation in tokens.
        aspect: Height of the grid divided by its width.

    Source: https://arxiv.org/abs/2210.00939
    """

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        o = kernel(q, k, v, scoring)
        start, stop = scoring.image or (0, o.shape[2])
        image = blurred(o[:, :, start:stop], self.sigma, self.aspect)
        return torch.cat((o[:, :, :start], image, o[:, :, stop:]), dim=2)


def blurred(t: Tensor, sigma: float, aspect: float = 1.0) -> Tensor:
    """``[B, H, S, D]`` blurred over S as a grid, mirrored at the edges.

    Raises:
        ValueError: S tokens are no grid of that aspect, its height divided by its width.
    """
    height = round(math.sqrt(t.shape[2] * aspect))
    if height == 0 or t.shape[2] % height:
        raise ValueError(
            f"aspect is {aspect}: {t.shape[2]} tokens are no grid of that height to width"
        )
    planes = t.transpose(-1, -2).flatten(1, 2).unflatten(-1, (height, -1))
    for axis in (-1, -2):
        planes = _along(planes, axis, sigma)
    return planes.flatten(-2).unflatten(1, (t.shape[1], -1)).transpose(-1, -2)


def _along(planes: Tensor, axis: int, sigma: float) -> Tensor:
    """Planes ``[B, N, height, width]`` blurred along one axis, mirrored at the edges."""
    reach = min(math.ceil(3 * sigma), planes.shape[axis] - 1)
    steps = torch.arange(-reach, reach + 1, dtype=planes.dtype, device=planes.device)
    bell = torch.exp(-0.5 * (steps / sigma) ** 2)
    bell = (bell / bell.sum()).view(1, 1, *((1, -1) if axis == -1 else (-1, 1)))
    sides = (reach, reach, 0, 0) if axis == -1 else (0, 0, reach, reach)
    channels = planes.shape[1]
    padded = F.pad(planes, sides, mode="reflect")
    return F.conv2d(padded, bell.expand(channels, 1, -1, -1), groups=channels)
