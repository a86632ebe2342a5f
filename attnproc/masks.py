"""The call's mask in its normal form: bool means "attend", float is added to the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .looked_at import hides_nothing, refuse_zero_one
from .types import (
    All,
    Arranged,
    Bias,
    Blocks,
    Causal,
    Keys,
    Mask,
    MaskKind,
    Scoring,
    Site,
    Window,
)

__all__ = ["Room", "factors", "fold", "joined", "padded", "truthy", "unmasked", "valid_text"]


class Room(NamedTuple):
    """What a mask has to fit."""

    batches: Sequence[int]
    """The batch, and smaller ones that a mask may be given for."""
    heads: int
    queries: int
    keys: int
    text_keys: int = 0
    """How many of the keys are a text's, which a mask may be given for alone."""
    text_first: bool = False


def padded(at: Site, arranged: Arranged, scoring: Scoring) -> Scoring:
    """A mask over all keys, or over the text keys of a joint sequence (the image stays visible).

    Takes ``[B, K]``, ``[B, Q|1, K]``, ``[B*H, Q|1, K]`` and ``[B|1, H|1, Q|1, K]``, and any mask
    kind of `attnproc.types`.
    """
    mask = at.call.mask
    return scoring if mask is None else _folded(at, mask, scoring, _room(at, arranged))


def truthy(at: Site, arranged: Arranged, scoring: Scoring) -> Scoring:
    """A key mask of any dtype: what is not zero may be attended to (Lumina)."""
    mask = at.call.mask
    if mask is None:
        return scoring
    mask = mask.bool().flatten(1) if isinstance(mask, Tensor) else mask
    return _folded(at, mask, scoring, _room(at, arranged))


def valid_text(at: Site, arranged: Arranged, scoring: Scoring) -> Scoring:
    """A mask ``[B, T]`` over the text: its padding neither attends nor is attended to (Mochi)."""
    mask = at.call.mask
    if mask is None:
        return scoring
    room = _room(at, arranged)
    mask = Keys(mask.bool()) if isinstance(mask, Tensor) else mask
    over_keys = [part for part in _parts(mask) if isinstance(part, Keys)]
    keep = fold(All(tuple(over_keys)), Scoring(), room).mask
    scoring = fold(mask, scoring, room)
    return scoring.but(keep=keep if isinstance(keep, Keys) else None)


def unmasked(at: Site, arranged: Arranged, scoring: Scoring) -> Scoring:
    """No mask; the module's `eps` guards the normaliser (DC-AE)."""
    return scoring.but(eps=at.attn.eps)


def _folded(at: Site, mask: Tensor | MaskKind, scoring: Scoring, room: Room) -> Scoring:
    """`fold`, without a mask over keys that hides none of them."""
    found, given = fold(mask, scoring, room), at.call.mask
    if isinstance(found.mask, Keys) and isinstance(given, Tensor) and hides_nothing(given):
        return scoring
    return found


def fold(mask: Tensor | MaskKind, scoring: Scoring, room: Room) -> Scoring:
    """The scoring with one more mask, in normal form.

    Raises:
        ValueError: The mask does not fit, or is of a dtype that means nothing.
    """
    for part in _parts(mask):
        if isinstance(part, All):
            scoring = fold(part, scoring, room)
        elif isinstance(part, Causal):
            scoring = scoring.but(causal=True)
        elif isinstance(part, Window):
            scoring = scoring.but(window=_narrower(scoring.window, part))
        elif isinstance(part, Blocks):
            scoring = scoring.but(mods=(*scoring.mods, part.mod))
        else:
            values = part if isinstance(part, Tensor) else part[0]
            kind = _within(_kind(_over_all_keys(values, room), room), values.shape[-1], room)
            scoring = scoring.but(mask=joined(scoring.mask, kind))
    return scoring


def joined(one: Mask | None, other: Mask) -> Mask:
    """Both masks of values as one: bools are "and"ed, biases added, what is false becomes -inf."""
    if one is None:
        return other
    if isinstance(one, Keys) and isinstance(other, Keys):
        return Keys(one.valid & other.valid)
    a, b = (m.valid[:, None, None] if isinstance(m, Keys) else m.values for m in (one, other))
    if a.dtype == torch.bool:
        return Bias(a & b) if b.dtype == torch.bool else Bias(b.masked_fill(~a, -torch.inf))
    return Bias(a.masked_fill(~b, -torch.inf) if b.dtype == torch.bool else a + b)


def factors(scoring: Scoring, dtype: torch.dtype) -> Tensor | None:
    """A mask over keys as factors ``[B|1, H|1, 1, K]`` for attention without a softmax.

    Raises:
        ValueError: The mask differs between queries, which linear attention can't honour.
    """
    mask, got = scoring.mask, ""
    if scoring.causal or scoring.window is not None or scoring.mods:
        got = "one of positions"
    elif isinstance(mask, Bias) and mask.values.shape[2] != 1:
        got = f"{list(mask.values.shape)} with one row a query"
    if got:
        raise ValueError(
            f"attention_mask is {got}: linear attention takes a mask over keys, [B, K] or "
            "[B|1, H|1, 1, K]"
        )
    if mask is None:
        return None
    if isinstance(mask, Keys):
        return mask.valid[:, None, None].to(dtype)
    factor = mask.values.to(dtype)
    return factor if mask.values.dtype == torch.bool else factor.exp()


def _parts(mask: Tensor | MaskKind) -> tuple[Tensor | MaskKind, ...]:
    return mask.parts if isinstance(mask, All) else (mask,)


def _room(at: Site, arranged: Arranged) -> Room:
    heads, queries = arranged.q.shape[1:3]
    # Rows that perturbation leaves unasked have values alone, later frames queries alone.
    batch = max(arranged.q.shape[0], arranged.v.shape[0])
    # Guidance by perturbation may be given the mask of the unperturbed rows alone.
    parts: list[Any] = [w for w in at.recipe.around if hasattr(w, "plain")]
    batches = [batch, *(part.plain(batch) for part in parts)]
    keys, text = arranged.k.shape[2], arranged.text_keys
    return Room(batches, heads, queries, keys, text, at.recipe.text_first)


def _narrower(
    one: tuple[int | None, int | None] | None, other: Window
) -> tuple[int | None, int | None]:
    one = (None, None) if one is None else one
    left, right = zip(one, (other.left, other.right), strict=True)
    return _least(*left), _least(*right)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _over_all_keys(mask: Tensor, room: Room) -> Tensor:
    length, keys, text = mask.shape[-1], room.keys, room.text_keys
    if length == keys:
        return mask
    if length != text:
        options = f"{keys} (all keys)" + (f" or {text} (the text keys)" if text else "")
        raise ValueError(f"attention_mask ends in {length} keys, this call has {options}")
    image = (0, keys - text) if room.text_first else (keys - text, 0)
    return F.pad(mask, image, value=mask.dtype == torch.bool)


def _within(kind: Mask, length: int, room: Room) -> Mask:
    """A mask that was given for the text alone hides nothing else."""
    if not isinstance(kind, Keys) or length == room.keys:
        return kind
    at = (0, length) if room.text_first else (room.keys - length, room.keys)
    return kind._replace(within=at)


def _kind(mask: Tensor, room: Room) -> Mask:
    heads, queries = room.heads, room.queries
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask is {mask.dtype}: give bool (true means attend) or float (added to "
            "the scores)"
        )
    refuse_zero_one(mask)
    shape = list(mask.shape)
    if mask.ndim == 3:
        stacked = heads > 1 and mask.shape[0] in [rows * heads for rows in room.batches]
        mask = mask.unflatten(0, (-1, heads)) if stacked else mask[:, None]
    elif mask.ndim == 2:
        mask = mask[:, None, None]
    if mask.ndim != 4 or not any(_fits(mask, (rows, heads, queries)) for rows in room.batches):
        raise ValueError(
            f"attention_mask is {shape}, which does not broadcast to "
            f"[{room.batches[0]}, {heads}, {queries}, {room.keys}] (batch, heads, queries, keys)"
        )
    over_keys = mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1
    return Keys(mask[:, 0, 0]) if over_keys else Bias(mask)


def _fits(mask: Tensor, target: tuple[int, int, int]) -> bool:
    return all(n in (1, full) for n, full in zip(mask.shape, target, strict=False))
