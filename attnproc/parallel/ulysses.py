"""A kernel that exchanges tokens for heads and back, for calls that nothing but it looks at.

The order of a sequence does not matter there, so that what arrives is used as it lies. Heads go in
parts: a part's exchange hides behind the attention of the one before. Source:
https://arxiv.org/abs/2309.14509
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import KernelCall, Scoring
from .exchange import Axis, post, received, shares, spans
from .spread import Heads, some_heads

__all__ = ["Exchanged"]

# Below so many tokens a second part costs more time to start than it hides.
_LONG = 8192


@dataclass(frozen=True)
class Exchanged:
    """A kernel of all tokens for own heads, called with own tokens of all heads.

    Args:
        axis: The ranks.
        heads: Which heads each of them computes.
        queries: How many queries each of them has.
        keys: How many keys.
        kernel: What it calls, without a mask.
    """

    axis: Axis
    heads: tuple[Heads, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    kernel: KernelCall

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention of own queries ``[B, H, S, D]`` to the keys ``[B, H', S, D]`` of all ranks.

        Raises:
            Lost: Another rank ended, or did not answer in time.
        """
        # Tokens first: what comes from all ranks is then one tensor.
        q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))  # [S, B, H, D]
        parts = self._parts()
        coming = [
            (
                self._post(q, [of.queries for of in part], self.queries),
                self._post(k, [of.keys for of in part], self.keys),
                self._post(v, [of.keys for of in part], self.keys),
            )
            for part in parts
        ]
        going: list[Tensor] = []
        for part, (at_q, at_k, at_v) in zip(parts, coming, strict=True):
            own = part[self.axis.rank]
            some_q = self._joined(at_q, q, len(own.queries), self.queries)
            some_k = self._joined(at_k, k, len(own.keys), self.keys)
            some_v = self._joined(at_v, v, len(own.keys), self.keys)
            going.append(self._post_back(self.kernel(some_q, some_k, some_v, scoring), part))
        shape = q.shape[:2]
        arrived = [self._home(at, part, shape) for at, part in zip(going, parts, strict=True)]
        # Of each rank all parts, then the next rank's.
        found = torch.cat(
            [of_rank for of_parts in zip(*arrived, strict=True) for of_rank in of_parts], dim=2
        )
        return found.permute(1, 2, 0, 3)

    def _parts(self) -> list[tuple[Heads, ...]]:
        """The heads of all ranks in one or two parts."""
        few = min(len(of.keys) if of.own else 0 for of in self.heads) < 2
        if few or sum(self.keys) < _LONG:
            return [self.heads]
        halves = [_halves(of) for of in self.heads]
        return [tuple(half[i] for half in halves) for i in range(2)]

    def _post(self, t: Tensor, heads: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Tensor:
        each = t.shape[1] * t.shape[3]
        own = len(heads[self.axis.rank])
        pieces = [some_heads(t, some) for some in heads]
        return post(pieces, [count * each * own for count in tokens], self.axis)

    def _joined(self, at: Tensor, like: Tensor, heads: int, tokens: tuple[int, ...]) -> Tensor:
        shape = sum(tokens), like.shape[1], heads, like.shape[3]
        return received(at, self.axis).view(shape).permute(1, 2, 0, 3)

    def _post_back(self, o: Tensor, part: tuple[Heads, ...]) -> Tensor:
        whole = o.permute(2, 0, 1, 3)
        # What another rank computes too is sent by that one alone.
        whole = whole if part[self.axis.rank].own else whole[:, :, :0]
        each = whole.shape[1] * o.shape[3] * self.queries[self.axis.rank]
        sizes = [each * len(of.queries) if of.own else 0 for of in part]
        return post([whole[span] for span in spans(self.queries)], sizes, self.axis)

    def _home(self, at: Tensor, part: tuple[Heads, ...], shape: Sequence[int]) -> list[Tensor]:
        flat = received(at, self.axis)
        counts = [len(of.queries) if of.own else 0 for of in part]
        dim = flat.numel() // max(1, math.prod(shape) * sum(counts))
        pieces = flat.split([math.prod(shape) * count * dim for count in counts])
        return [t.view(*shape, n, dim) for t, n in zip(pieces, counts, strict=True)]


def _halves(heads: Heads) -> tuple[Heads, Heads]:
    """A rank's heads in two parts, each of whole groups."""
    group = len(heads.queries) // len(heads.keys)
    first, _ = shares(len(heads.keys), 2)
    at = heads.queries.start + first * group
    return (
        Heads(range(heads.queries.start, at), heads.keys[:first]),
        Heads(range(at, heads.queries.stop), heads.keys[first:]),
    )
