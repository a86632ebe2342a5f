"""Captured maps of all heads, where each rank has some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..types import Recipe
from .exchange import gather
from .spread import Room

__all__ = ["of_all_heads"]


def of_all_heads(recipe: Recipe, room: Room) -> Recipe:
    """The recipe with recorders that hand over maps of the heads of all ranks."""
    around: list[Any] = list(recipe.around)
    if not any(hasattr(part, "maps") for part in around):
        return recipe
    around = [
        replace(part, maps=_Everyones(part.maps, room)) if hasattr(part, "maps") else part
        for part in around
    ]
    return recipe.but(around=tuple(around))


class _Everyones:
    """`Maps` whose calls see some heads: it takes the maps of each, and reduces those of all."""

    def __init__(self, maps: Any, room: Room) -> None:
        self.maps, self.room = maps, room

    def wants(self, layer: str) -> bool:
        return self.maps.wants(layer)

    def add(self, layer: str, found: Tensor) -> None:
        self.maps.add(layer, found)

    def reduced(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Maps.reduced`; what it costs more is the way of the maps, not of keys."""
        maps, room = self.maps, self.room
        heads, maps.heads = maps.heads, "each"
        try:
            found = maps.reduced(*args, **kwargs)
        finally:
            maps.heads = heads
        mine = room.heads[room.axis.rank]
        counts = [len(of.queries) if of.own else 0 for of in room.heads]
        found = gather(found if mine.own else found[:, :0], counts, 1, room.axis)
        if heads == "each":
            return found
        return found.mean(dim=1) if heads == "mean" else found[:, list(heads)].mean(dim=1)
