"""Prompts with weights, and which tokens the words of a prompt became."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Weighted", "parse", "tokens_of"]

_WEIGHTED = re.compile(r"\(([^():]+):\s*([^():]*)\)")


@dataclass(frozen=True)
class Weighted:
    """A prompt without its weights, and the weights.

    Attributes:
        text: The plain prompt.
        spans: Start and end in the text of each part with a weight, and the weight.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...] = ()


def parse(prompt: str) -> Weighted:
    """Takes the weights out of a prompt such as ``a (red:1.4) heart`` or ``heart (red:-1)``.

    Raises:
        ValueError: A weight is no number.
    """
    text, spans, last = "", [], 0
    for found in _WEIGHTED.finditer(prompt):
        words, number = found.groups()
        try:
            weight = float(number)
        except ValueError:
            raise ValueError(
                f"the weight of {words!r} is {number!r}: give a number, as in ({words}:1.4)"
            ) from None
        text += prompt[last : found.start()]
        spans.append((len(text), len(text) + len(words), weight))
        text, last = text + words, found.end()
    return Weighted(text + prompt[last:], tuple(spans))


def tokens_of(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> list[tuple[int, ...]]:
    """The positions of the tokens that parts of a text became.

    Args:
        tokenizer: A fast tokenizer of transformers, as pipelines have.
        text: The prompt.
        spans: Start and end of each part in the text.

    Raises:
        ValueError: The tokenizer does not tell where its tokens come from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer is {type(tokenizer).__name__}: a fast one is needed, which tells where in "
            "the text its tokens stand"
        )
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [
        tuple(i for i, (a, b) in enumerate(offsets) if a < b and a < stop and b > start)
        for start, stop in spans
    ]
