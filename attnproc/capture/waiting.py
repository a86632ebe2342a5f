"""Calls that wait for others of their shape.

A call of few keys is little work in many launches; those of several layers take as many together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import Mask, Scoring
from .weights import at_once

__all__ = ["Waiting", "may_wait"]

# Scores of all that wait on a CPU, where launches cost less than what leaves the cache.
_CACHED = 1 << 18


class _Call(NamedTuple):
    q: Tensor
    k: Tensor
    scoring: Scoring


class Waiting:
    """At most one call a layer, and no more scores of all than one call may hold at a time."""

    def __init__(self) -> None:
        self.calls: dict[str, _Call] = {}
        self.size = 0

    def __contains__(self, layer: str) -> bool:
        return layer in self.calls

    def add(self, layer: str, q: Tensor, k: Tensor, scoring: Scoring) -> bool:
        """Adds a call, q ``[B, H, Q, D]`` and k ``[B, H', K, D]``, if there is room for it."""
        batch, heads, queries, dim = q.shape
        # Its scores, or its queries if those are more.
        size = self.size + batch * heads * queries * max(k.shape[2], dim)
        if layer in self.calls or size > _room(q):
            return False
        self.calls[layer], self.size = _Call(q, k, scoring), size
        return True

    def leave(self) -> Iterator[tuple[list[str], Tensor, Tensor, Scoring]]:
        """Takes all calls out: those of one kind as a batch, in the order of its layers."""
        groups: dict[Any, list[str]] = {}
        calls, self.calls, self.size = self.calls, {}, 0
        for layer, call in calls.items():
            groups.setdefault(_kind(call), []).append(layer)
        for layers in groups.values():
            some = [calls.pop(layer) for layer in layers]
            yield layers, *_batch(some)


def may_wait(scoring: Scoring) -> bool:
    """Whether calls of such a scoring can be one batch."""
    return not scoring.mods and scoring.keep is None and not isinstance(scoring.scale, Tensor)


def _room(q: Tensor) -> int:
    return _CACHED if q.device.type == "cpu" else at_once(q)


def _kind(call: _Call) -> Any:
    """What calls of one batch have in common."""
    q, k, scoring = call
    kind = q.shape, k.shape, q.dtype, q.device
    mask = scoring.mask
    if mask is None:
        return *kind, scoring
    return *kind, scoring._replace(mask=None), type(mask), mask[0].shape, mask[0].dtype


def _batch(calls: list[_Call]) -> tuple[Tensor, Tensor, Scoring]:
    """Calls of one kind as one."""
    if len(calls) == 1:
        return calls[0]
    qs, ks, scorings = zip(*calls, strict=True)
    masks = [scoring.mask for scoring in scorings]
    scoring = scorings[0]._replace(mask=_mask(masks, qs[0].shape[0]))
    return torch.cat(qs), torch.cat(ks), scoring


def _mask(masks: list[Any], batch: int) -> Mask | None:
    if masks[0] is None:
        return None
    return type(masks[0])(torch.cat([mask[0].expand(batch, *mask[0].shape[1:]) for mask in masks]))
