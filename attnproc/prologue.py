"""Everything between the projections and the kernel, as one function.

Heads are split, queries and keys normed and rotated, the streams joined and laid out for the
kernel. This is the only place where a fused kernel may stand in for the composed parts.
"""

from __future__ import annotations

from torch import Tensor

from .fused import arranged
from .shapes import join, split_stream
from .types import QKV, Arranged, Site, Streams

__all__ = ["arrange", "normed"]


def arrange(at: Site, streams: Streams) -> Arranged:
    """Makes the kernel's inputs ``[B, H, S, D]`` of the streams ``[B, S, H*D]``, using them up."""
    recipe, rotary = at.recipe, at.recipe.rotary
    image, text = streams
    q = image.q
    dim = q.shape[3] if q.ndim == 4 else q.shape[2] // at.attn.heads
    split_stream(image, dim)
    if text is not None:
        split_stream(text, dim)
    length, text_keys = q.shape[1], 0 if text is None else text.k.shape[1]

    del q
    raw = QKV(image.q, image.k, image.v) if recipe.prompts else None
    both = arranged(at, streams, rotary)
    if both is None:
        recipe.norm(at, streams)
        if rotary is not None and rotary.over == "image":
            rotary(at, image)
        both = join(streams, recipe.text_first)
        if rotary is not None and rotary.over == "joint":
            rotary(at, both)
    q, k, v = both.q, both.k, both.v
    if q.dtype != v.dtype or k.dtype != v.dtype:
        q, k = q.to(v.dtype), k.to(v.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return Arranged(q, k, v, length, text_keys, raw)


def normed(at: Site, q: Tensor) -> Tensor:
    """The image's queries ``[B, S, H, D]`` normed, without rotary embedding, for image prompts."""
    alone = Streams(QKV(q, None, None))
    both = arranged(at, alone, None)
    if both is not None:
        return both.q
    at.recipe.norm(at, alone)
    return alone.image.q
