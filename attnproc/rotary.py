"""Rotary position embeddings.

Source: https://arxiv.org/abs/2104.09864. The forms differ in which channels make a pair and in how
the angles come; each takes ``[B, S, H, D]`` and computes in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .kernels.fusing import keeps_nothing
from .types import QKV, Site

__all__ = ["Rotary", "Table", "axes", "complex_pairs", "halves", "pairs", "per_head", "table_of"]


@dataclass(frozen=True)
class Rotary:
    """Where a form of rotary embedding acts.

    Args:
        form: One of the functions of this module.
        over: "image" rotates the image stream before the join, "joint" the joint sequence.
        keys: "always", "self" (not where the module is cross attention), "own" (by their own
            table `key_rope`).
        queries: "always" or "self".
    """

    form: Callable[[Tensor, Any], Tensor]
    over: Literal["image", "joint"] = "image"
    keys: Literal["always", "self", "own"] = "self"
    queries: Literal["always", "self"] = "always"

    def __call__(self, stream: QKV, tables: tuple[Any, Any]) -> None:
        """Rotates queries and keys of the stream ``[B, S, H, D]`` by their tables."""
        of_queries, of_keys = tables
        if of_queries is not None:
            stream.q = self.form(stream.q, of_queries)
        if of_keys is not None:
            stream.k = self.form(stream.k, of_keys)

    def tables(self, at: Site) -> tuple[Any, Any]:
        """The call's tables for queries and for keys; None for what is not rotated."""
        matters = "self" in (self.queries, self.keys)
        cross = matters and at.setting("is_cross_attention", False)
        rope = at.call.rope
        key_rope = at.call.key_rope if self.keys == "own" else rope
        return (
            None if cross and self.queries == "self" else rope,
            None if cross and self.keys == "self" else key_rope,
        )


def pairs(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Neighbouring channels; `table` is cos and sin ``[S, D]`` (CogVideoX, Flux, Hunyuan-DiT)."""
    if keeps_nothing():
        return _turn_pairs(x, table)
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    return _turn(x, torch.stack((-imag, real), dim=-1).flatten(-2), table)


def halves(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Channel i with i + R/2, in the first R; cos and sin are ``[S, R]`` (Stable Audio)."""
    turned = table[0].shape[-1]
    head, rest = x[..., :turned], x[..., turned:]
    real, imag = head.chunk(2, dim=-1)
    head = _turn(head, torch.cat((-imag, real), dim=-1), table)
    return torch.cat((head, rest), dim=-1) if rest.shape[-1] else head


def per_head(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Neighbouring channels, other angles a head: cos and sin are ``[S, H, D/2]`` (Mochi)."""
    cos, sin = table
    if keeps_nothing():
        wide = torch.view_as_complex(_wide(x).unflatten(-1, (-1, 2)).contiguous())
        turned = wide * torch.complex(cos.to(wide.real.dtype), sin.to(wide.real.dtype))
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    real, imag = _wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def complex_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Neighbouring channels, times `table`: numbers ``[B|1, S, D/2]``, mostly complex (Lumina)."""
    cos, sin = (part.unsqueeze(2) for part in _real_imag(table))
    return per_head(x, (cos, sin))


def axes(x: Tensor, table: tuple[Any, Any]) -> Tensor:
    """Three thirds of the channels, each by halves along its axis (Allegro).

    `table` is ((cos, sin) of time, height, width, each ``[positions, D/3]``) and the three indices
    of positions ``[B|1, S]``.
    """
    tables, positions = table
    thirds = x.chunk(3, dim=-1)
    turned = [
        halves(third, (cos[position], sin[position]))
        for third, (cos, sin), position in zip(thirds, tables, positions, strict=True)
    ]
    return torch.cat(turned, dim=-1)


class Table(NamedTuple):
    """The table of any form in one layout, for kernels that rotate themselves.

    Args:
        cos: ``[B|1, S, H|1, turned / step]``.
        sin: As `cos`.
        width: Channels d and d + width / 2 of each group of `width` make a pair.
        turned: How many channels are rotated.
        step: How many channels share an entry.
    """

    cos: Tensor
    sin: Tensor
    width: int
    turned: int
    step: int = 1


def table_of(form: Callable[[Tensor, Any], Tensor], table: Any) -> Table | None:
    """A form's table in one layout; None for a form or a shape that is not known."""
    if form is pairs or form is halves:
        cos, sin = table
        turned = cos.shape[-1]
        width = 2 if form is pairs else turned
        if cos.ndim == sin.ndim == 2:
            # One view in place of two, of which there are two for every call.
            cos, sin = (part.view(1, part.shape[0], 1, part.shape[1]) for part in table)
            return Table(cos, sin, width, turned)
        if cos.ndim != 3 or sin.ndim != 3:
            return None
        return Table(cos.unsqueeze(2), sin.unsqueeze(2), width, turned)
    if form is per_head:
        cos, sin = (part[None] if part.ndim == 3 else part for part in table)
        return Table(cos, sin, 2, 2 * cos.shape[-1], 2) if cos.ndim == 4 else None
    if form is complex_pairs:
        cos, sin = _real_imag(table)
        return Table(cos.unsqueeze(2), sin.unsqueeze(2), 2, 2 * cos.shape[-1], 2)
    if form is axes:
        tables, positions = table
        third = tables[0][0].shape[-1]
        both = [
            torch.cat([part[i][at] for part, at in zip(tables, positions, strict=True)], dim=-1)
            for i in (0, 1)
        ]
        cos, sin = (part if part.ndim == 3 else part[None] for part in both)
        return Table(cos.unsqueeze(2), sin.unsqueeze(2), third, 3 * third)
    return None


def _real_imag(numbers: Tensor) -> tuple[Tensor, Tensor]:
    if numbers.is_complex():
        return numbers.real, numbers.imag
    return numbers, torch.zeros_like(numbers)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _turn_pairs(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`pairs` in half as many passes, changing the result in place."""
    cos, sin = (part.to(x.device).unsqueeze(-2) for part in table)
    wide = _wide(x)
    turned = wide * cos
    turned[..., 0::2].addcmul_(wide[..., 1::2], sin[..., 0::2], value=-1)
    turned[..., 1::2].addcmul_(wide[..., 0::2], sin[..., 1::2])
    return turned.to(x.dtype)


def _turn(x: Tensor, quarter: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`x` turned by the table's angles, given what a quarter turn makes of it."""
    cos, sin = (part.to(x.device).unsqueeze(-2) for part in table)
    turned = _wide(x) * cos
    # In place of a third wide tensor; the products' gradients need only their factors.
    turned += _wide(quarter) * sin
    return turned.to(x.dtype)
