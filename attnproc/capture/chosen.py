"""Which queries and keys are captured: words by position, parts of the image by boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..types import Scoring

__all__ = ["Box", "Labels", "Slab", "by_label", "grid_of", "positions", "side", "sides"]

Slab = Literal["image-text", "text-image", "image-image", "text-text"]


@dataclass(frozen=True)
class Box:
    """A part of the image in fractions of its width and height, from the upper left corner.

    It holds the tokens whose centre lies in it, at least the one that is nearest to its middle: a
    box without extent is a point.
    """

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        if not (0 <= self.left <= self.right <= 1 and 0 <= self.top <= self.bottom <= 1):
            raise ValueError(
                f"the box is {self.left}, {self.top}, {self.right}, {self.bottom}; possible are "
                "fractions left <= right and top <= bottom from 0 to 1"
            )

    @classmethod
    def point(cls, x: float, y: float) -> Box:
        """One place of the image."""
        return cls(x, y, x, y)

    def tokens(self, height: int, width: int) -> list[int]:
        """The positions of its tokens in a grid, counted row by row."""
        rows = _within(self.top, self.bottom, height)
        return [row * width + col for row in rows for col in _within(self.left, self.right, width)]


Labels = Mapping[str, "int | Sequence[int] | Box"] | Sequence[int] | None


def by_label(labels: Labels, name: str = "words") -> dict[str, list[int] | Box] | None:
    """The positions by label; a list labels itself, None is all.

    Raises:
        ValueError: There are none.
    """
    if labels is None:
        return None
    if not isinstance(labels, Mapping):
        labels = {str(index): index for index in labels}
    if not labels:
        raise ValueError(f"{name} is empty: give positions of keys, or None for all of them")
    return {label: _listed(at) for label, at in labels.items()}


def positions(
    labels: Mapping[str, list[int] | Box] | None, room: range, aspect: float, name: str
) -> list[list[int]] | None:
    """Positions in the whole sequence, a group a label; None is all of `room`.

    Args:
        labels: What was asked for, counted from the start of `room`.
        room: Where this side's tokens stand in the sequence.
        aspect: Height of the image's grid divided by its width.
        name: What the labels are called, for messages.

    Raises:
        ValueError: A position is outside.
    """
    if labels is None:
        return None
    found = [_inside(at, len(room), aspect) for at in labels.values()]
    outside = sorted({i for group in found for i in group if not 0 <= i < len(room)})
    if outside:
        raise ValueError(
            f"{name} has positions {outside}, this layer has keys 0 to {len(room) - 1}"
        )
    return [[room.start + i for i in group] for group in found]


def side(which: str, image: tuple[int, int] | None, total: int) -> range:
    """Where the image's or the text's tokens stand among `total` of a sequence."""
    if image is None:
        return range(total)
    start, stop = image
    if which == "image":
        return range(start, stop)
    return range(start) if start else range(stop, total)


def sides(slab: Slab, scoring: Scoring, queries: int, keys: int) -> tuple[range, range]:
    """Where the queries and the keys of a slab stand.

    Raises:
        ValueError: The text has no queries there.
    """
    of_queries, of_keys = slab.split("-")
    if of_queries == "text" and scoring.image is None:
        raise ValueError(f"slab is {slab!r}: the text has no queries in this layer")
    return side(of_queries, scoring.image, queries), side(of_keys, scoring.image_keys, keys)


def grid_of(tokens: int, aspect: float) -> tuple[int, int]:
    """Height and width of a grid of so many tokens.

    Raises:
        ValueError: There is no such grid.
    """
    height = round(math.sqrt(tokens * aspect))
    if height == 0 or tokens % height:
        raise ValueError(f"aspect is {aspect}: {tokens} queries are no grid of that aspect")
    return height, tokens // height


def _listed(at: int | Sequence[int] | Box) -> list[int] | Box:
    if isinstance(at, Box):
        return at
    return [at] if isinstance(at, int) else list(at)


def _inside(at: list[int] | Box, tokens: int, aspect: float) -> list[int]:
    return at.tokens(*grid_of(tokens, aspect)) if isinstance(at, Box) else at


def _within(low: float, high: float, count: int) -> list[int]:
    inside = [i for i in range(count) if low <= (i + 0.5) / count <= high]
    return inside or [min(count - 1, int((low + high) / 2 * count))]
