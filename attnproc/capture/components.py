"""Principal components of a layer's self-attention map, without ever holding the map.

The rows of the map, one a pixel, are vectors of as many entries as there are pixels. What varies
most between them parts the picture into things. Queries and keys are kept, and subspace iteration
needs of the map only its products with a few vectors, which come a chunk of queries at a time.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.reference import expand_heads
from ..places import grid_of, sides
from ..rows import part_rows, rows_from, take
from ..types import KernelCall, Scoring
from .recorder import Recorder, record
from .weights import weights
from .within import wrapped

__all__ = ["Components", "components", "principal"]

_ROUNDS = 24
# Vectors beyond those asked for make the iteration converge faster.
_SPARE = 8


class Components:
    """Queries and keys of one call a layer, and the components of their maps.

    Args:
        step: Which call of a layer is kept, counted from 0.
        part: Which of how many equal parts of the batch is kept.
        aspect: Height of the image's grid divided by its width.

    Attributes:
        pairs: Queries and keys of the image ``[2, B, H, S, D]`` by the layer's path.
    """

    def __init__(self, step: int, part: tuple[int, int], aspect: float = 1.0) -> None:
        self.step, self.part, self.aspect = step, part, aspect
        self.pairs: dict[str, Tensor] = {}
        self.scales: dict[str, float | Tensor | None] = {}
        self.seen: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Components(step {self.step}; {len(self.pairs)} layers)"

    def of(self, layer: str, count: int = 3) -> tuple[Tensor, Tensor]:
        """The first components of a layer's map, mean over heads.

        Returns:
            Pictures ``[B, count, height, width]`` of the pixels' places along the components, and
            the share ``[B, count]`` of the variance that each holds.

        Raises:
            KeyError: That layer was not captured.
        """
        if layer not in self.pairs:
            raise KeyError(f"{layer!r} was not captured, there are {', '.join(self.pairs)}")
        q, k = self.pairs[layer]
        found, share = principal(q, k, Scoring(scale=self.scales[layer]), count)
        return found.unflatten(-1, grid_of(q.shape[2], self.aspect)), share


@dataclass(frozen=True)
class _Keep(Recorder):
    found: Components
    """Where queries and keys are kept."""
    layer: str

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        with torch.no_grad():
            rows = part_rows(self.found.part, q.shape[0])
            of_q, of_k = sides("image-image", scoring, q.shape[2], k.shape[2])
            some_q = take(rows_from(q.detach(), rows), of_q, 2)
            some_k = take(rows_from(expand_heads(k.detach(), q), rows), of_k, 2)
            pair = torch.stack((some_q, some_k))
            self.found.scales[self.layer] = scoring.scale
            if torch.compiler.is_compiling():
                record(self.ticket, pair)
            else:
                self.take(pair)
        return kernel(q, k, v, scoring)

    def take(self, found: Tensor) -> None:
        """Keeps the queries and keys, if it is the call that was asked for."""
        step = self.found.seen.get(self.layer, 0)
        self.found.seen[self.layer] = step + 1
        if step == self.found.step:
            self.found.pairs[self.layer] = found


@contextmanager
def components(
    model: nn.Module,
    layers: str = "*",
    *,
    step: int = 0,
    kind: Any = "self",
    part: tuple[int, int] = (1, 2),
    aspect: float = 1.0,
) -> Generator[Components]:
    """Keeps the queries and keys of self attention for the components of its maps.

    Args:
        model: A model whose processors are ours, as after `attnproc.swap(model)`.
        layers: Pattern of the paths of attention modules.
        step: Which call of each layer, counted from 0.
        kind: "self", or "joint" for the image's tokens of joint attention.
        part: Which of how many equal parts of the batch is kept.
        aspect: Height of the image divided by its width.

    Yields:
        What gives the components, once the model ran. Masks do not enter them.
    """
    found = Components(step, part, aspect)
    with wrapped(model, layers, kind, lambda path: _Keep(found, path)):
        yield found


def principal(q: Tensor, k: Tensor, scoring: Scoring, count: int) -> tuple[Tensor, Tensor]:
    """Places of the queries along the principal components of their attention maps.

    Subspace iteration (https://arxiv.org/abs/0909.4061) on the centred map, mean over heads.

    Args:
        q: Queries ``[B, H, Q, D]``.
        k: Keys ``[B, H, K, D]``.
        scoring: Their mask and scale.
        count: How many components.

    Returns:
        Places ``[B, count, Q]``, and the share of the variance ``[B, count]``.
    """
    width = min(count + _SPARE, k.shape[2])
    start = torch.randn(
        k.shape[2], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    right = start.to(device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    right = right.expand(q.shape[0], -1, -1)  # [B, K, width]
    middle, variance = _first_moments(q, k, scoring)
    for _ in range(_ROUNDS):
        right = torch.linalg.qr(_there_and_back(q, k, scoring, middle, right)[1]).Q

    left, back = _there_and_back(q, k, scoring, middle, right)
    values, turn = torch.linalg.eigh(right.transpose(-1, -2) @ back)
    turn, values = turn.flip(-1)[..., :count], values.flip(-1)[..., :count]
    places = (left @ turn).transpose(-1, -2)
    # A component has no sign of its own.
    sign = places.sum(dim=-1, keepdim=True).sign() + (places.sum(dim=-1, keepdim=True) == 0)
    return places * sign, values / variance[:, None]


def _first_moments(q: Tensor, k: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """The map's mean row ``[B, 1, K]``, and the sum of squares about it ``[B]``."""
    rows: Any = 0.0
    squares: Any = 0.0
    for part in weights(q, k, scoring):
        mean = part.mean(dim=1)
        rows = rows + mean.sum(dim=1, keepdim=True)
        squares = squares + mean.square().sum(dim=(1, 2))
    middle = rows / q.shape[2]
    return middle, squares - q.shape[2] * middle.square().sum(dim=(1, 2))


def _there_and_back(
    q: Tensor, k: Tensor, scoring: Scoring, middle: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Products of the centred map A with vectors ``[B, K, n]``: A x, and A^T A x."""
    shift, left, back = middle @ right, [], 0.0
    for part in weights(q, k, scoring):
        mean = part.mean(dim=1)  # [B, rows, K]
        some = mean @ right - shift
        left.append(some)
        back = back + mean.transpose(-1, -2) @ some
    whole = torch.cat(left, dim=1)
    return whole, back - middle.transpose(-1, -2) @ whole.sum(dim=1, keepdim=True)
