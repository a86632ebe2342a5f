"""Everything between the projections and the kernel, as one function.

Heads are split, queries and keys normed and rotated, the streams joined and laid out for the
kernel. This is the only place where a fused kernel may stand in for the composed parts.
"""

from __future__ import annotations

from .shapes import head_dim, join, split_stream
from .types import Arranged, Site, Streams

__all__ = ["arrange"]


def arrange(at: Site, streams: Streams) -> Arranged:
    """Makes the kernel's inputs ``[B, H, S, D]`` of the streams ``[B, S, H*D]``."""
    recipe, rotary = at.recipe, at.recipe.rotary
    dim = head_dim(at.attn, streams.image.q)
    image = split_stream(streams.image, dim)
    text = None if streams.text is None else split_stream(streams.text, dim)
    raw = image

    image, text = recipe.norm(at, Streams(image, text))
    query = image.q
    if rotary is not None and rotary.over == "image":
        image = rotary(at, image)

    both = join(Streams(image, text), recipe.text_first)
    if rotary is not None and rotary.over == "joint":
        both = rotary(at, both)

    q, k, v = both
    q, k = (t if t.dtype == v.dtype else t.to(v.dtype) for t in (q, k))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return Arranged(q, k, v, raw, query, 0 if text is None else text.k.shape[1])
