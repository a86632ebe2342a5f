"""Places: the image's and the text's in a sequence, and parts of the image in its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .types import Scoring

__all__ = ["Box", "Slab", "grid_of", "side", "sides"]

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
        rows, cols = self.spans(height, width)
        return [row * width + col for row in rows for col in cols]

    def spans(self, height: int, width: int) -> tuple[range, range]:
        """The rows and the columns of its tokens in a grid."""
        return _within(self.top, self.bottom, height), _within(self.left, self.right, width)


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


def _within(low: float, high: float, count: int) -> range:
    inside = [i for i in range(count) if low <= (i + 0.5) / count <= high]
    if inside:
        return range(inside[0], inside[-1] + 1)
    middle = min(count - 1, int((low + high) / 2 * count))
    return range(middle, middle + 1)
