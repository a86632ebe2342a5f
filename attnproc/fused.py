"""The prologue by fused kernels, where they can stand in for the composed parts.

What the parts are decides, never a class: norms of known formula, rotary forms of known layout,
plain tensors on a GPU. Everything else goes the composed way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels.fusing import fusable, keeps_nothing
from .norms import Formula, Norms, formula
from .rotary import Rotary, Table, table_of
from .types import QKV, Streams

__all__ = ["fused"]

_NO_NORM = Formula("none", None, None, 0.0, False)


def fused(
    streams: Streams,
    norms: Norms,
    text_first: bool,
    rotary: Rotary | None,
    tables: tuple[Any, Any],
) -> QKV | None:
    """Streams ``[B, S, H, D]`` normed, rotated and joined; None where no kernel can.

    Uses the streams up, unless it gives None.
    """
    image, text = streams.image, streams.text
    if not fusable(image.q) or not _takes(image, text):
        return None
    formulas = [_formulas(norms.image, image), _formulas(norms.text, text)]
    turned = None if rotary is None else _tables(streams, rotary, tables)
    if any(known is None for known in formulas) or (rotary is not None and turned is None):
        return None
    over = "image" if rotary is None else rotary.over
    both = QKV(None, None, None)
    hows: dict[str, tuple[tuple[Formula | None, ...], Table | None]] = {"v": ((None, None), None)}
    for i, name in enumerate("qk"):
        pair = tuple(known[i] for known in formulas if known is not None)
        if len({n.across for n in pair if n is not None}) > 1:
            return None
        hows[name] = pair, None if turned is None else turned[i]
    for name in "qkv":
        parts = streams.take(name)
        setattr(both, name, _laid(parts, *hows[name], text_first, over == "joint"))
    return both


def _takes(image: QKV, text: QKV | None) -> bool:
    """Whether the tensors are of one kind."""
    first = image.q
    found = [image.k, image.v] + ([] if text is None else [text.q, text.k, text.v])
    return all(t is None or (t.dtype == first.dtype and t.is_cuda == first.is_cuda) for t in found)


def _formulas(norms: tuple[Any, Any], stream: QKV | None) -> tuple[Formula | None, ...] | None:
    """Formulas of the norms of queries and keys; None where one has none."""
    if stream is None:
        return None, None
    found: list[Formula | None] = []
    for norm, x in zip(norms, (stream.q, stream.k), strict=True):
        known = None
        if norm is not None and x is not None:
            known = formula(norm, x.shape[2], x.shape[3], x.dtype)
            if known is None:
                return None
        found.append(known)
    return tuple(found)


def _tables(
    streams: Streams, rotary: Rotary, tables: tuple[Any, Any]
) -> tuple[Table | None, Table | None] | None:
    """Rotary tables of queries and keys; None where one does not fit the kernels."""
    of_queries, of_keys = tables
    found = None if of_queries is None else table_of(rotary.form, of_queries)
    # Compiled code can't compare tables by identity; keys have another one only of their own.
    other = None if rotary.keys == "own" else found
    if of_keys is None:
        other = None
    elif other is None:
        other = table_of(rotary.form, of_keys)
    for name, rope, table in (("q", of_queries, found), ("k", of_keys, other)):
        if rope is not None and (table is None or not _fits(table, streams, name, rotary.over)):
            return None
    return found, other


def _fits(table: Table, streams: Streams, name: str, over: str) -> bool:
    """Whether a table has an entry for each token, of tensors that need no gradient."""
    x = getattr(streams.image, name)
    if x is None:
        return False
    more = None if streams.text is None or over == "image" else getattr(streams.text, name)
    tokens = x.shape[1] + (0 if more is None else more.shape[1])
    batch, positions, heads, entries = table.cos.shape
    return (
        table.cos.shape == table.sin.shape
        and batch in (1, x.shape[0])
        and positions == tokens
        and heads in (1, x.shape[2])
        and entries * table.step == table.turned <= x.shape[3]
        and table.turned % table.width == 0
        and (table.width > 2 or table.turned == x.shape[3])
        and not (table.cos.requires_grad or table.sin.requires_grad)
    )


def _laid(
    parts: tuple[Tensor | None, Tensor | None],
    norms: tuple[Formula | None, ...],
    table: Table | None,
    text_first: bool,
    joint: bool,
) -> Tensor | None:
    """Queries, keys or values of both streams, by the kernel where anything is to do."""
    from .kernels.triton.lay import Lay, lay

    turns = (table is not None, table is not None and joint)
    found: list[tuple[Any, ...]] = [
        part for part in zip(parts, norms, turns, strict=True) if part[0] is not None
    ]
    if text_first:
        found.reverse()
    if not found:
        return None
    pair: Any = (*found, (None, None, False))[:2]
    (x, n0, t0), (then, n1, t1) = pair
    if n0 is None and table is None and n1 is None:
        if then is None:
            return x
        # torch's own join is as fast for whole tensors, and gives gradients as views.
        if not keeps_nothing() or x.is_contiguous():
            return torch.cat((x, then), dim=1)
    one, other = n0 or _NO_NORM, n1 or _NO_NORM
    kinds = one.number, other.number
    across, eps = one.across or other.across, (one.eps, other.eps)
    weights = (one.weight, one.bias, other.weight, other.bias)
    if table is None:
        return lay(x, then, Lay(kinds, eps, across), weights)
    shape = (table.width, table.turned, table.step)
    how = Lay(kinds, eps, across, (t0, t1), joint, *shape)
    return lay(x, then, how, weights, (table.cos, table.sin))
