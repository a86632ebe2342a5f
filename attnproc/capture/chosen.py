"""Which queries and keys are captured: words by position, parts of the image by boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..places import Box, grid_of

__all__ = ["Labels", "by_label", "positions"]


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


def _listed(at: int | Sequence[int] | Box) -> list[int] | Box:
    if isinstance(at, Box):
        return at
    return [at] if isinstance(at, int) else list(at)


def _inside(at: list[int] | Box, tokens: int, aspect: float) -> list[int]:
    return at.tokens(*grid_of(tokens, aspect)) if isinstance(at, Box) else at
