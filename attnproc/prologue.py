"""Everything between the projections and the kernel, as one function.

Heads are split, queries and keys normed and rotated, the streams joined and laid out for the
kernel. This is the only place where a fused kernel may stand in for the composed parts.
"""

from __future__ import annotations

from typing import Any

from torch.compiler import is_compiling

from .fused import Fused
from .norms import Norms
from .rotary import Rotary
from .shapes import heads_first
from .types import QKV, Arranged, Site, Streams

__all__ = ["arrange", "laid"]

# Elements of queries below which a pass over them takes less time than its launch.
_FEW = 1 << 22


def arrange(at: Site, streams: Streams) -> Arranged:
    """Makes the kernel's inputs ``[B, H, S, D]`` of the streams ``[B, S, H*D]``, using them up."""
    recipe, image, text = at.recipe, streams.image, streams.text
    shape, text_keys = image.q.shape, 0
    dim = shape[3] if len(shape) == 4 else shape[2] // at.attn.heads
    norms, rotary = recipe.norm(at, text is not None), recipe.rotary
    if text is not None:
        text_keys = text.k.shape[1]
    idle = rotary is None and norms.none
    if idle and (text is None or not recipe.prompts):
        both = _untouched(streams, recipe.text_first)
        if both is not None:
            few = at.keeps_nothing
            q, k = heads_first(both.q, dim, few), heads_first(both.k, dim, few)
            return Arranged(q, k, heads_first(both.v, dim, few), shape[1], text_keys)

    image.split(dim)
    if text is not None:
        text.split(dim)
    untouched = idle and text is None
    raw = QKV(image.q, image.k, image.v) if recipe.prompts and not untouched else None
    if rotary is None:
        both = laid(streams, norms, recipe.text_first)
    else:
        both = laid(streams, norms, recipe.text_first, rotary, rotary.tables(at))
    return Arranged(
        both.q.transpose(1, 2), both.k.transpose(1, 2), both.v.transpose(1, 2),
        shape[1], text_keys, raw,
    )  # fmt: skip


def _untouched(streams: Streams, text_first: bool) -> QKV | None:
    """Streams ``[B, S, H*D]`` to which nothing is done but a join, as one, using them up.

    None where heads have to be split first, or dtypes differ.
    """
    image, text = streams.image, streams.text
    if text is None:
        return image if image.alike else None
    # On a CPU the tokens of a head are to lie side by side; slices are joined faster by a kernel.
    if image.q.is_cpu or not (image.k is None or image.k.is_contiguous()):
        return None
    alike = image.q.dtype == text.k.dtype == text.v.dtype
    return streams.join(text_first) if alike else None


def laid(
    streams: Streams,
    norms: Norms,
    text_first: bool = False,
    rotary: Rotary | None = None,
    tables: tuple[Any, Any] = (None, None),
) -> QKV:
    """Streams ``[B, S, H, D]`` normed, rotated and joined to one, using them up.

    Args:
        streams: Image and, in joint attention, text.
        norms: Layers that norm them.
        text_first: Whether the text stands before the image.
        rotary: How queries and keys are rotated.
        tables: The tables for queries and for keys; None for what is not rotated.
    """
    image, text = streams.image, streams.text
    idle = norms.none and tables[0] is None and tables[1] is None
    if idle and text is None and (image.v is None or image.alike):
        return image
    if text is None:
        # A rotary embedding alone is left to the compiler where launches decide: its own pass goes
        # over queries and keys at once, with a third of the kernel's arguments.
        plain = idle or (norms.none and is_compiling() and image.q.numel() < _FEW)
    else:
        # At most a join is left, which torch does as fast for whole tensors.
        plain = idle and (image.k is None or image.k.is_contiguous())
    both = None if plain else Fused(streams, norms, text_first, rotary, tables).laid()
    if both is None:
        norms.over(streams)
        if rotary is not None and rotary.over == "image":
            rotary(image, tables)
        both = streams.join(text_first)
        if rotary is not None and rotary.over == "joint":
            rotary(both, tables)
    q, k, v = both.q, both.k, both.v
    if v is not None and (q.dtype != v.dtype or k.dtype != v.dtype):
        both.q, both.k = q.to(v.dtype), k.to(v.dtype)
    return both
