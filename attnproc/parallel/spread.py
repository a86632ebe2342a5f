"""How a sequence is spread over ranks: which of them has which tokens, rows and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .exchange import ALONE, Axis, send, spans

__all__ = [
    "Heads",
    "Room",
    "Running",
    "Sequences",
    "Spread",
    "Text",
    "heads_of",
    "to_heads",
    "to_tokens",
]

Text = Literal["split", "replicated"]


class Running:
    """What is known while a model runs.

    Attributes:
        rows: How many rows of the batch each rank has, where the model runs on its own ones.
        text: Own tokens of text in the last joint call. Later blocks may join the streams
            themselves (Flux), and call with one sequence.
    """

    def __init__(self) -> None:
        self.rows: tuple[int, ...] | None = None
        self.text: int | None = None


@dataclass(frozen=True, eq=False)
class Spread:
    """The ranks that attention of a model is spread over.

    Attributes:
        ulysses: Ranks that exchange tokens for heads.
        ring: Ranks round which keys and values travel.
        tokens: All of them, ring by ring: rank i has the i-th part of the sequence.
        batch: Ranks that have rows of the batch.
        everyone: The ranks of all axes, batch before tokens.
        inside: Whether modules get all tokens and take their own, in place of getting their own.
        text: Whether the text of joint attention comes in parts too, or whole to each rank.
        uneven: Whether parts that come may differ in length.
        wide: Whether the ring sums up in float32.
        running: What is known while the model runs.
    """

    ulysses: Axis = ALONE
    ring: Axis = ALONE
    tokens: Axis = ALONE
    batch: Axis = ALONE
    everyone: Axis = ALONE
    inside: bool = False
    text: Text = "split"
    uneven: bool = False
    wide: bool = True
    running: Running = field(default_factory=Running)


class Sequences(NamedTuple):
    """The parts of a joint sequence, of which each rank has one of the text and of the image."""

    text: tuple[int, ...]
    image: tuple[int, ...]
    text_first: bool

    def length(self, rank: int) -> int:
        """Tokens of a rank."""
        return self.text[rank] + self.image[rank]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole sequence of the ranks' parts ``[B, S_i, H, D]``, in one process's order."""
        if not any(self.text):
            return torch.cat(tuple(parts), dim=1)
        both = [self._parted(part, rank) for rank, part in enumerate(parts)]
        texts, images = zip(*both, strict=True)
        return torch.cat((*texts, *images) if self.text_first else (*images, *texts), dim=1)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """The ranks' parts of a whole sequence ``[B, S, H, D]``."""
        if not any(self.text):
            return [whole[:, span] for span in spans(self.image)]
        lengths = [sum(self.text), sum(self.image)]
        streams = whole.split(lengths if self.text_first else lengths[::-1], dim=1)
        text, image = streams if self.text_first else streams[::-1]
        found: list[Tensor] = []
        for of_text, of_image in zip(spans(self.text), spans(self.image), strict=True):
            both = text[:, of_text], image[:, of_image]
            found.append(torch.cat(both if self.text_first else both[::-1], dim=1))
        return found

    def _parted(self, part: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        text, image = self.text[rank], self.image[rank]
        if self.text_first:
            first, last = part.split((text, image), dim=1)
            return first, last
        first, last = part.split((image, text), dim=1)
        return last, first


class Heads(NamedTuple):
    """The heads that a rank computes."""

    queries: range
    keys: tuple[int, ...]
    """Heads of keys and values: as many as divide those of the queries."""
    own: bool = True
    """False where there are more ranks than heads: what it computes is another rank's too."""


def heads_of(heads: int, kv_heads: int, ranks: int) -> list[Heads]:
    """Which heads each rank computes: as many each, or some one more.

    Key heads stay with their queries; where they are fewer than the ranks, several ranks get the
    same.
    """
    groups = heads // kv_heads
    if kv_heads >= ranks:
        # Whole groups.
        counts = [(kv_heads * (i + 1)) // ranks - (kv_heads * i) // ranks for i in range(ranks)]
        return [
            Heads(range(s.start * groups, s.stop * groups), tuple(range(s.start, s.stop)))
            for s in spans(counts)
        ]
    found: list[Heads] = []
    for i in range(ranks):
        queries = range((heads * i) // ranks, (heads * (i + 1)) // ranks)
        own = len(queries) > 0
        if not own:
            queries = range(i % heads, i % heads + 1)
        keys = tuple(head // groups for head in queries)
        found.append(Heads(queries, keys[:1] if len(set(keys)) == 1 else keys, own))
    return found


class Room(NamedTuple):
    """Whom an exchange is between, and what each of them has."""

    axis: Axis
    rows: tuple[int, ...]
    """Rows of the batch of each group of ranks."""
    heads: tuple[Heads, ...]

    @property
    def ranks(self) -> int:
        """How many ranks have the same rows."""
        return self.axis.size // len(self.rows)

    def assembled(self, parts: Sequence[Tensor], tokens: Sequences) -> Tensor:
        """All rows and tokens of the ranks' parts ``[B_i, S_i, h, D]``."""
        each = self.ranks
        rows = [tokens.joined(parts[i : i + each]) for i in range(0, len(parts), each)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def taken_apart(self, whole: Tensor, tokens: Sequences) -> list[Tensor]:
        """The ranks' parts of all rows and tokens."""
        return [part for rows in whole.split(list(self.rows)) for part in tokens.parts(rows)]


def to_heads(
    room: Room, q: Tensor, k: Tensor, v: Tensor, of_q: Sequences, of_k: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    """Own tokens of all heads for all tokens of own heads.

    Args:
        room: The ranks.
        q: Own queries ``[B, H, S, D]``.
        k: Own keys ``[B, H', K, D]``.
        v: Own values.
        of_q: Whose queries stand where; by rank within those of the same rows.
        of_k: Whose keys.

    Returns:
        ``[B, h, Q, D]`` and twice ``[B, h', K, D]``, in the order of one process.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, S, H, D]
    parts = [
        [some_heads(q, heads.queries), some_heads(k, heads.keys), some_heads(v, heads.keys)]
        for heads in room.heads
    ]
    mine = room.heads[room.axis.rank]
    shapes: list[list[tuple[int, ...]]] = []
    for i in range(room.axis.size):
        rows, rank = room.rows[i // room.ranks], i % room.ranks
        queries, keys = of_q.length(rank), of_k.length(rank)
        shapes.append(
            [
                (rows, queries, len(mine.queries), q.shape[3]),
                (rows, keys, len(mine.keys), k.shape[3]),
                (rows, keys, len(mine.keys), v.shape[3]),
            ]
        )
    got = send(parts, shapes, room.axis)
    of = (of_q, of_k, of_k)
    q, k, v = (
        room.assembled([part[i] for part in got], tokens).transpose(1, 2)
        for i, tokens in enumerate(of)
    )
    return q, k, v


def to_tokens(room: Room, o: Tensor, of_q: Sequences) -> Tensor:
    """All tokens of own heads ``[B, h, Q, D]`` for own tokens of all heads ``[B, H, S, D]``."""
    mine = room.heads[room.axis.rank]
    whole = o.transpose(1, 2)
    # What another rank computes too is sent by that one alone.
    whole = whole if mine.own else whole[:, :, :0]
    parts = [[part] for part in room.taken_apart(whole, of_q)]
    me = room.axis.rank
    rows, tokens = room.rows[me // room.ranks], of_q.length(me % room.ranks)
    shapes = [
        [(rows, tokens, len(heads.queries) if heads.own else 0, o.shape[3])]
        for heads in room.heads
    ]
    got = send(parts, shapes, room.axis)
    return torch.cat([part for (part,) in got], dim=2).transpose(1, 2)


def some_heads(t: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of ``[..., H, D]``, along the third axis."""
    if heads and heads[-1] - heads[0] == len(heads) - 1:
        return t[:, :, heads[0] : heads[-1] + 1]
    return t[:, :, list(heads)]
