"""A kernel that exchanges tokens for heads and back, for calls that nothing but it looks at.

The order of a sequence does not matter there: a rank's own tokens stand first and are never sent,
and what comes from the others is used as it lies. Heads go in parts: where copies carry it, the
exchange of a part hides behind the attention of the one before, that of the small first one behind
the copying of the rest. Source: https://arxiv.org/abs/2309.14509
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import KernelCall, Scoring
from .copies import route
from .exchange import Axis, Coming, direct, post, spans
from .spread import Heads, some_heads

__all__ = ["Exchanged", "parts_of"]

# Below so many tokens further parts cost more time to start than they hide.
_LONG = 8192
# The first and the last part, whose exchanges show, have one of so many heads.
_EDGE = 6


Part = tuple[Heads, ...]
"""Some heads of each rank."""


@dataclass(frozen=True)
class Exchanged:
    """A kernel of all tokens for own heads, called with own tokens of all heads.

    Args:
        axis: The ranks.
        parts: What is exchanged at once, and the pieces of it that the kernel is called with.
        queries: How many queries each of them has.
        keys: How many keys.
        kernel: What it calls, without a mask.
    """

    axis: Axis
    parts: tuple[tuple[Part, tuple[Part, ...]], ...]
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
        coming = [self._posted(q, k, v, part) for part, _ in self.parts]
        back: list[tuple[Tensor, Coming, Part]] = []
        for _, pieces in self.parts:
            come = [t for bundle in coming.pop(0) for t in bundle.joined()]
            q, k, v = (t.permute(1, 2, 0, 3) for t in come)  # [B, h, S, D]
            for piece, of_q, of_k in self._spans(pieces):
                o = self.kernel(q[:, of_q], k[:, of_k], v[:, of_k], scoring)
                back.append(self._post_back(o.permute(2, 0, 1, 3), piece))
        found = [self._home(*piece) for piece in back]
        # Of each rank all pieces, then the next rank's.
        whole = torch.cat([t for of_rank in zip(*found, strict=True) for t in of_rank], dim=2)
        return _as(v.dtype, whole).permute(1, 2, 0, 3)

    def _spans(self, pieces: tuple[Part, ...]) -> list[tuple[Part, slice, slice]]:
        """Where the own heads of each piece lie among those of all pieces."""
        own = [piece[self.axis.rank] for piece in pieces]
        of_q, of_k = spans([len(of.queries) for of in own]), spans([len(of.keys) for of in own])
        return list(zip(pieces, of_q, of_k, strict=True))

    def _posted(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> list[_Bundle]:
        """Starts to exchange some heads; in one message where all three tensors are alike."""
        of_q, of_k = [heads.queries for heads in part], [heads.keys for heads in part]
        if self.queries == self.keys and q.shape[3] == v.shape[3] and q.dtype == v.dtype:
            return [self._post((q, k, v), (of_q, of_k, of_k), self.queries)]
        return [
            self._post((q,), (of_q,), self.queries),
            self._post((k,), (of_k,), self.keys),
            self._post((v,), (of_k,), self.keys),
        ]

    def _post(
        self,
        tensors: tuple[Tensor, ...],
        heads: tuple[Sequence[Sequence[int]], ...],
        tokens: tuple[int, ...],
    ) -> _Bundle:
        """Starts to exchange some heads of each tensor, which lie side by side on the way.

        Args:
            tensors: ``[S, B, H, D]`` each.
            heads: For each of them, the heads that each rank gets.
            tokens: How many tokens each rank has.
        """
        me, dtype = self.axis.rank, tensors[0].dtype
        plain = all(map(direct, tensors))
        if plain:
            tensors = tuple(_words(t) for t in tensors)
        pieces = [
            [some_heads(t, of[rank]) for t, of in zip(tensors, heads, strict=True)]
            for rank in range(self.axis.size)
        ]
        counts = [len(of[me]) for of in heads]
        own, (_, batch, _, dim) = tokens[me], tensors[0].shape
        shape = batch, sum(counts), dim
        coming = [batch * sum(counts) * dim * count for count in tokens]
        sizes = [own * batch * dim * sum(t.shape[2] for t in piece) for piece in pieces]
        coming[me] = sizes[me] = 0
        if not plain:
            others = [torch.cat(p, dim=2).flatten() for i, p in enumerate(pieces) if i != me]
            row = torch.cat(others)
            at = post(row, sizes, coming, self.axis)
            return _Bundle(at, torch.cat(pieces[me], dim=2), counts, dtype)
        like = tensors[0]
        of_each = [batch * dim * sum(len(of[r]) for of in heads) for r in range(self.axis.size)]
        way = route(self.axis, partial(_sent, tokens, of_each), like)
        row = like.new_empty(sum(sizes)) if way is None else way.row(sum(sizes), like.dtype)
        whole = like.new_empty(sum(tokens), *shape)
        for piece, span in zip(pieces, spans(sizes), strict=True):
            if span.stop > span.start:
                torch.cat(piece, dim=2, out=row[span].view(own, batch, -1, dim))
        # Copies of the exchange before are waited for by `post`, so there is no hiding behind it.
        if way is not None:
            torch.cat(pieces[me], dim=2, out=whole[:own])
        at = post(row, sizes, coming, self.axis, whole[own:].view(-1), way)
        if way is None:
            torch.cat(pieces[me], dim=2, out=whole[:own])
        return _Bundle(at, whole, counts, dtype)

    def _post_back(self, o: Tensor, part: Part) -> tuple[Tensor, Coming, Part]:
        """Own tokens of a part's own heads ``[S, B, h, D]``, and those of others on their way."""
        me, whole = self.axis.rank, _words(o) if direct(o) else o
        # What another rank computes too is sent by that one alone.
        whole = whole if part[me].own else whole[:, :, :0]
        own, each = self.queries[me], whole.shape[1] * whole.shape[3]
        sizes = [each * whole.shape[2] * count for count in self.queries]
        coming = [each * own * len(of.queries) if of.own else 0 for of in part]
        coming[me] = sizes[me] = 0
        others, way = whole[own:], None
        if direct(o):
            of_each = [each * len(of.queries) if of.own else 0 for of in part]
            way = route(self.axis, partial(_sent_back, self.queries, of_each), whole)
        if way is None:
            row = others.reshape(-1)
        else:
            row = way.row(others.numel(), others.dtype)
            row.view(others.shape).copy_(others)
        return whole[:own], post(row, sizes, coming, self.axis, way=way), part

    def _home(self, own: Tensor, coming: Coming, part: Part) -> list[Tensor]:
        """Own tokens ``[S, B, h, D]`` of the heads of each rank."""
        tokens, batch, _, dim = own.shape
        counts = [len(of.queries) if of.own else 0 for of in part]
        counts[self.axis.rank] = 0
        pieces = coming.wait().split([tokens * batch * dim * count for count in counts])
        found = [t.view(tokens, batch, n, dim) for t, n in zip(pieces, counts, strict=True)]
        found[self.axis.rank] = own
        return found


class _Bundle(NamedTuple):
    """Tensors that come side by side."""

    coming: Coming
    whole: Tensor
    """``[S, B, h, D]``: own tokens first, then room for the others; own ones alone where a
    gradient is wanted."""
    counts: list[int]
    """Heads of each tensor."""
    dtype: torch.dtype

    def joined(self) -> tuple[Tensor, ...]:
        """All tokens of each tensor ``[S, B, h, D]``, once they are there."""
        row, whole = self.coming.wait(), self.whole
        if self.coming.work is None:
            whole = torch.cat((whole, row.view(-1, *whole.shape[1:])))
        return _as(self.dtype, whole).split(self.counts, dim=2)


def _sent(tokens: Sequence[int], of_each: Sequence[int], one: int, other: int) -> int:
    """How many numbers of its own tokens one rank has for another's heads."""
    return 0 if one == other else tokens[one] * of_each[other]


def _sent_back(tokens: Sequence[int], of_each: Sequence[int], one: int, other: int) -> int:
    """How many numbers of its own heads one rank has for another's tokens."""
    return _sent(tokens, of_each, other, one)


def _words(t: Tensor) -> Tensor:
    """The same numbers as words of 16 or 8 bytes, of which copies take less time.

    Channels decide, which are the same on all ranks.
    """
    for dtype in (torch.complex128, torch.int64):
        each = dtype.itemsize // t.element_size()
        if each > 1 and t.shape[-1] % each == 0:
            places = (*t.stride()[:-1], t.storage_offset())
            fits = t.stride(-1) == 1 and all(place % each == 0 for place in places)
            return (t if fits else t.clone(memory_format=torch.contiguous_format)).view(dtype)
    return t


def _as(dtype: torch.dtype, words: Tensor) -> Tensor:
    return words if words.dtype == dtype else words.view(dtype)


def parts_of(heads: Part, keys: int) -> tuple[tuple[Part, tuple[Part, ...]], ...]:
    """What `Exchanged` exchanges at once and calls the kernel with, for so many keys in all.

    The first exchange and that of the last piece show, so these are small.
    """
    few = min(len(of.keys) if of.own else 0 for of in heads)
    if few < 2 or keys < _LONG:
        return ((heads, (heads,)),)
    first, rest = _cut(heads, 1)
    return (first, (first,)), (rest, (rest,) if few == 2 else _cut(rest, -1))


def _cut(part: Part, sign: int) -> tuple[Part, Part]:
    """Each rank's heads in two, in whole groups, with few in the first part, or in the last."""
    cut: list[tuple[Heads, Heads]] = []
    for heads in part:
        keys, group = len(heads.keys), len(heads.queries) // len(heads.keys)
        at = sign * max(1, round(keys / _EDGE))
        cut.append(
            (
                Heads(heads.queries[: at * group], heads.keys[:at]),
                Heads(heads.queries[at * group :], heads.keys[at:]),
            )
        )
    first, last = zip(*cut, strict=True)
    return first, last
