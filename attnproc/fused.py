"""The prologue by fused kernels, where they can stand in for the composed parts.

What the parts are decides, never a class: norms of known formula, rotary forms of known layout,
plain tensors on a GPU. Everything else goes the composed way.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from .kernels.takes import constant
from .norms import NAMES, Formula, formula
from .rotary import Rotary, Table, table_of
from .types import QKV, Site, Streams

__all__ = ["arranged", "use_fused"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Triton's interpreter runs the kernels on a CPU, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_wanted = os.environ.get("ATTNPROC_FUSED", "1") != "0"


def use_fused(wanted: bool) -> None:
    """Turns fused kernels on (as they are at first) or off, for the whole process.

    They compute what the composed parts compute, with fewer roundings. Off is for comparing, and
    for what they do not have: gradients of gradients. The environment variable
    ``ATTNPROC_FUSED=0`` does the same at the start.
    """
    global _wanted
    _wanted = wanted


def arranged(at: Site, streams: Streams, rotary: Rotary | None) -> QKV | None:
    """Streams ``[B, S, H, D]`` normed, rotated and joined; None where no kernel can.

    Uses the streams up, unless it gives None.
    """
    image, text = streams
    if not (image.q.is_cuda or _INTERPRETED):
        return None
    names = NAMES.get(at.recipe.norm)
    if not _wanted or names is None or not _takes(image, text):
        return None
    norms = (_norms(at, names[0], image), None if text is None else _norms(at, names[1], text))
    tables = _tables(at, streams, rotary)
    if norms[0] is False or norms[1] is False or tables is None:
        return None
    of_image, of_text = norms[0], norms[1] or (None, None)
    if all(part is None for part in (*of_image, *of_text, *tables)):
        return None
    hows = [
        _how(
            at.recipe.text_first,
            rotary,
            (getattr(image, n), None if text is None else getattr(text, n)),
            (norm, other),
            table,
        )
        for n, norm, other, table in zip("qk", of_image, of_text, tables, strict=True)
    ]
    if any(how is None for how in hows):
        return None
    both = QKV(None, None, None)
    for name, how in zip("qk", hows, strict=True):
        setattr(both, name, _laid(at, name, streams, how))
    both.v = _joined(at, streams)
    return both


def _takes(image: QKV, text: QKV | None) -> bool:
    """Whether the tensors are of a kind that the kernels take."""
    found = [image.q, image.k, image.v]
    found += [] if text is None else [text.q, text.k, text.v]
    first = image.q
    if first.dtype not in _DTYPES or not _has_triton():
        return False
    return all(t is None or (t.dtype == first.dtype and t.is_cuda == first.is_cuda) for t in found)


@constant
@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _norms(at: Site, names: tuple[str, str] | None, stream: QKV) -> Any:
    """Formulas of the norms of queries and keys; False where one has none."""
    found: list[Formula | None] = []
    for name, x in zip(names or (), (stream.q, stream.k), strict=False):
        norm = getattr(at.attn, name, None)
        if norm is None or x is None:
            found.append(None)
            continue
        known = formula(norm, x.shape[2], x.shape[3], x.dtype)
        if known is None:
            return False
        found.append(known)
    return tuple(found) or (None, None)


def _tables(
    at: Site, streams: Streams, rotary: Rotary | None
) -> tuple[Table | None, Table | None] | None:
    """Rotary tables of queries and keys; None where one does not fit the kernels."""
    if rotary is None:
        return None, None
    of_queries, of_keys = rotary.tables(at)
    found = None if of_queries is None else table_of(rotary.form, of_queries)
    same = of_keys is of_queries
    other = found if same or of_keys is None else table_of(rotary.form, of_keys)
    other = None if of_keys is None else other
    for name, rope, table in (("q", of_queries, found), ("k", of_keys, other)):
        if rope is not None and (table is None or not _fits(table, streams, name, rotary.over)):
            return None
    return found, other


def _fits(table: Table, streams: Streams, name: str, over: str) -> bool:
    """Whether a table has an entry for each token, of tensors that need no gradient."""
    x, text = getattr(streams.image, name), None
    if streams.text is not None:
        text = getattr(streams.text, name)
    if x is None:
        return False
    tokens = x.shape[1] + (0 if text is None or over == "image" else text.shape[1])
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


def _how(
    text_first: bool,
    rotary: Rotary | None,
    streams: tuple[Tensor | None, Tensor | None],
    norms: tuple[Formula | None, Formula | None],
    table: Table | None,
) -> Any:
    """What the kernel does to queries or keys: settings, weights, table; None if it can't."""
    from .kernels.triton.lay import KINDS, Lay

    known = [norm for norm in norms if norm is not None]
    if len({norm.across for norm in known}) > 1:
        return None
    joint = rotary is not None and rotary.over == "joint"
    turns = (table is not None, table is not None and joint)
    parts = [
        part
        for part, x in zip(zip(norms, turns, strict=True), streams, strict=True)
        if x is not None
    ]
    if text_first:
        parts.reverse()
    (n0, t0), (n1, t1) = (*parts, (None, False), (None, False))[:2]
    how = Lay(
        norms=(KINDS.index(n0.kind) if n0 else 0, KINDS.index(n1.kind) if n1 else 0),
        eps=(n0.eps if n0 else 0.0, n1.eps if n1 else 0.0),
        across=any(norm.across for norm in known),
        turns=(t0, t1),
        joint=joint,
        width=table.width if table else 2,
        turned=table.turned if table else 0,
        step=table.step if table else 1,
    )
    weights = (n0 and n0.weight, n0 and n0.bias, n1 and n1.weight, n1 and n1.bias)
    return how, weights, None if table is None else (table.cos, table.sin)


def _laid(at: Site, name: str, streams: Streams, how: Any) -> Tensor:
    from .kernels.triton.lay import lay

    first, last = _ordered(at, name, streams)
    settings, weights, table = how
    if last is None and settings.norms[0] == 0 and not settings.turns[0]:
        return first
    return lay(first, last, settings, weights, table)


def _joined(at: Site, streams: Streams) -> Tensor:
    first, last = _ordered(at, "v", streams)
    return first if last is None else torch.cat((first, last), dim=1)


def _ordered(at: Site, name: str, streams: Streams) -> tuple[Tensor, Tensor | None]:
    """The tensors of both streams in the order of the joint sequence, taken out of them."""
    image, text = streams
    a, b = getattr(image, name), None if text is None else getattr(text, name)
    setattr(image, name, None)
    if text is not None:
        setattr(text, name, None)
    if a is None or b is None:
        return (b if a is None else a), None
    return (b, a) if at.recipe.text_first else (a, b)
