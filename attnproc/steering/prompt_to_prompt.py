"""Prompt-to-prompt: a second prompt's picture with the first one's layout."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..places import side
from ..rows import part_rows, rows_from, scoring_of
from ..types import KernelCall, Scoring
from .passing import unobserved
from .strength import Strength, mixed, now

__all__ = ["Alignment", "PromptToPrompt", "align"]


@dataclass(frozen=True)
class Alignment:
    """Which tokens of a first prompt stand for those of a second.

    Args:
        pairs: (first prompt's token, second prompt's token, share of the map that it gets).
        new: Tokens of the second prompt that keep maps of their own.
    """

    pairs: tuple[tuple[int, int, float], ...]
    new: tuple[int, ...] = ()


def align(
    first: Sequence[str],
    second: Sequence[str],
    *,
    replaced: Literal["first", "own"] = "first",
    start: int = 1,
    length: int | None = None,
) -> Alignment:
    """Aligns two prompts, given as lists of tokens without special ones.

    Tokens that both have go together. Where some tokens stand in place of others, the new ones
    get the maps of the old, in equal shares ("replace"); those that are only added keep their own
    ("refine").

    Args:
        first: The prompt whose layout is kept.
        second: The prompt of the new picture.
        replaced: "own" lets tokens that stand in place of others keep their own maps, too.
        start: How many special tokens stand before the words.
        length: Tokens of the padded sequence; those after the words go together.
    """
    pairs = [(i, i, 1.0) for i in range(start)]
    new: list[int] = []
    matcher = difflib.SequenceMatcher(a=list(first), b=list(second), autojunk=False)
    for tag, a, a_end, b, b_end in matcher.get_opcodes():
        old, fresh = range(start + a, start + a_end), range(start + b, start + b_end)
        if tag == "equal" or (tag == "replace" and replaced == "first" and len(old) == len(fresh)):
            pairs += [(i, j, 1.0) for i, j in zip(old, fresh, strict=True)]
        elif tag == "replace" and replaced == "first":
            pairs += [(i, j, 1 / len(fresh)) for i in old for j in fresh]
        else:
            new += fresh
    ends = start + len(first), start + len(second)
    after = max(0, (length or 0) - max(ends))
    pairs += [(ends[0] + i, ends[1] + i, 1.0) for i in range(after)]
    rest = (length or 0) - ends[1] - after
    new += range(ends[1] + after, ends[1] + after + max(0, rest))
    return Alignment(tuple(pairs), tuple(new))


@dataclass(frozen=True)
class PromptToPrompt:
    """Gives the pictures of a batch the attention maps of its first picture.

    The map of the first picture times the second's values is one attention: with the first's
    queries and keys, and values that are moved to the first's tokens. Tokens that only the second
    prompt has add an attention of their own. So no map is made, and any kernel runs.

    Args:
        alignment: The tokens of cross attention or of the text of joint attention; None keeps the
            values as they are, which is for self attention.
        part: Which of how many equal parts of the batch is edited; its first row is the picture
            whose layout the others take.
        strength: From 0, no change, to 1; a `Schedule` says during which steps, as the layout is
            made in the first ones.

    Source: https://arxiv.org/abs/2208.01626
    """

    alignment: Alignment | None = None
    part: tuple[int, int] = (1, 2)
    strength: Strength = 1.0
    name: ClassVar[str] = "prompt_to_prompt"

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        strength, batch = now(self.strength), q.shape[0]
        rows = part_rows(self.part, batch)
        steady = not isinstance(strength, Tensor)
        if (steady and strength == 0) or rows.stop - rows.start < 2:
            return kernel(q, k, v, scoring)
        edited = slice(rows.start + 1, rows.stop)
        source = [rows.start if edited.start <= i < edited.stop else i for i in range(batch)]

        values, own = v, None
        if self.alignment is not None:
            values, own = _moved(self.alignment, v, scoring, edited)
        from_q, from_k = rows_from(q, source), rows_from(k, source)
        o = kernel(from_q, from_k, values, scoring_of(scoring, source, batch))
        if own is not None:
            some = scoring_of(scoring, range(edited.start, edited.stop), batch)
            more = unobserved(kernel)(q[edited], k[edited], own, some)
            o = torch.cat((o[: edited.start], o[edited] + more, o[edited.stop :]))
        if steady and strength == 1:
            return o
        return mixed(unobserved(kernel)(q, k, v, scoring), o, strength)


def _moved(
    alignment: Alignment, v: Tensor, scoring: Scoring, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """The values at the first prompt's tokens, and those of new tokens alone."""
    text = side("text", scoring.image_keys, v.shape[2])
    made = _matrices if torch.compiler.is_compiling() else _kept_matrices
    move, fresh = made(alignment, v.dtype, v.device)
    if len(move) > len(text):
        raise ValueError(f"alignment has {len(move)} tokens, the text has {len(text)}")
    start, stop = text.start, text.start + len(move)
    some = v[rows]
    words = some[:, :, start:stop]
    moved = torch.cat((some[:, :, :start], move @ words, some[:, :, stop:]), dim=2)
    values = torch.cat((v[: rows.start], moved, v[rows.stop :]))
    if not alignment.new:
        return values, None
    return values, F.pad(words * fresh, (0, 0, start, v.shape[2] - stop))


def _matrices(
    alignment: Alignment, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What moves the values of words ``[T, T]``, and 1 for new words ``[T, 1]``."""
    length = 1 + max([i for pair in alignment.pairs for i in pair[:2]] + [*alignment.new, 0])
    move = [[0.0] * length for _ in range(length)]
    for i, j, share in alignment.pairs:
        move[i][j] = share
    fresh = [[float(i in alignment.new)] for i in range(length)]
    options: Any = {"dtype": dtype, "device": device}
    return torch.tensor(move, **options), torch.tensor(fresh, **options)


_kept_matrices = functools.lru_cache(maxsize=64)(_matrices)
