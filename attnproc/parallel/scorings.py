"""Masks as a rank sees them that computes some heads of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.visible import OfRows
from ..types import All, Bias, Blocks, Keys, MaskKind
from .exchange import Axis, gather
from .spread import Sequences

__all__ = ["gathered_keys", "gathered_rows", "of_heads", "over_keys"]

AnyMask = Tensor | MaskKind | None


def over_keys(mask: AnyMask) -> bool:
    """Whether a mask is the same for every query."""
    if mask is None or isinstance(mask, Keys):
        return True
    if isinstance(mask, All):
        return all(map(over_keys, mask.parts))
    values = mask.values if isinstance(mask, Bias) else mask
    return isinstance(values, Tensor) and (values.ndim < 3 or values.shape[-2] == 1)


def of_heads(mask: Any, heads: range, total: int, batches: Sequence[int]) -> Any:
    """A mask of the call, for some of its heads.

    Args:
        mask: As a caller gives it.
        heads: Which heads.
        total: How many there are.
        batches: The batch, and smaller ones that a mask may be given for.
    """
    if isinstance(mask, All):
        return All(tuple(of_heads(part, heads, total, batches) for part in mask.parts))
    if isinstance(mask, Blocks):
        return Blocks(OfRows(mask.mod, 0, heads.start)) if heads.start else mask
    if isinstance(mask, Bias):
        return Bias(_some(mask.values, heads, total, batches))
    return _some(mask, heads, total, batches) if isinstance(mask, Tensor) else mask


def _some(values: Tensor, heads: range, total: int, batches: Sequence[int]) -> Tensor:
    if values.ndim == 3:
        # As four axes, since three could be read another way with fewer heads.
        stacked = total > 1 and values.shape[0] in [rows * total for rows in batches]
        values = values.unflatten(0, (-1, total)) if stacked else values[:, None]
    if values.ndim == 4 and values.shape[1] > 1:
        return values[:, heads.start : heads.stop]
    return values


def gathered_rows(mask: AnyMask, rows: tuple[int, ...], axis: Axis) -> AnyMask:
    """A mask of own rows of the batch, for all of them."""
    if mask is None or axis.size == 1:
        return mask
    if isinstance(mask, All):
        parts: Any = tuple(gathered_rows(part, rows, axis) for part in mask.parts)
        return All(parts)
    if isinstance(mask, Keys | Bias):
        return type(mask)(_all_rows(mask[0], rows, axis))
    return _all_rows(mask, rows, axis) if isinstance(mask, Tensor) else mask


def _all_rows(values: Tensor, rows: tuple[int, ...], axis: Axis) -> Tensor:
    if values.ndim < 2 or values.shape[0] % rows[axis.rank]:
        return values
    each = values.shape[0] // rows[axis.rank]
    return _plain(values, [count * each for count in rows], 0, axis)


def gathered_keys(mask: AnyMask, of_k: Sequences, axis: Axis) -> AnyMask:
    """A mask over own keys, as a plan that splits it makes one, for all keys; others stay."""
    if not isinstance(mask, Tensor) or axis.size == 1:
        return mask
    last, own = mask.shape[-1], of_k.length(axis.rank)
    text, whole = of_k.text[axis.rank], sum(of_k.text)
    if last in (whole, whole + sum(of_k.image)) or last not in (own, text):
        return mask
    if last == own:
        at = text if of_k.text_first else own - text
        first, second = mask[..., :at], mask[..., at:]
        counts = (of_k.text, of_k.image) if of_k.text_first else (of_k.image, of_k.text)
        parts = [_plain(p, c, -1, axis) for p, c in zip((first, second), counts, strict=True)]
        return torch.cat(parts, dim=-1)
    return _plain(mask, of_k.text, -1, axis)


def _plain(values: Tensor, counts: Any, dim: int, axis: Axis) -> Tensor:
    """`gather`, also of bool tensors."""
    if values.dtype != torch.bool:
        return gather(values, counts, dim, axis)
    return gather(values.to(torch.uint8), counts, dim, axis).bool()
