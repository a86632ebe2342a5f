"""Projections of the result.

Each takes the result ``[B, Q, H*D]``, where the image stands in it (None: it is all image), and
what image prompts add to the image, or None. It returns image, text or None and, where the family
returns them apart, prompts.
"""

from __future__ import annotations

from torch import Tensor

from .fused_grid import normed
from .linears import dropout
from .types import Site

__all__ = ["grid_out", "prompt_apart", "raw_heads", "to_both", "to_out", "to_out_shared"]

Span = tuple[int, int] | None
Pair = tuple[Tensor, Tensor | None]
Result = Pair | tuple[Tensor, Tensor | None, Tensor]


def to_out(at: Site, o: Tensor, span: Span, extra: Tensor | None) -> Pair:
    """The image's output projection, where the module has one; the text as it is."""
    image, text = _parted(o, span, extra)
    return _projected(at, image), text


def to_both(at: Site, o: Tensor, span: Span, extra: Tensor | None) -> Pair:
    """Each stream's own output projection, where the module has one."""
    image, text = to_out(at, o, span, extra)
    if text is not None and at.held("to_add_out") is not None:
        text = at.linear("to_add_out", text)
    return image, text


def to_out_shared(at: Site, o: Tensor, span: Span, extra: Tensor | None) -> Pair:
    """One output projection for both streams."""
    if extra is None:
        return _parted(_projected(at, o), span, None)
    image, text = to_out(at, o, span, extra)
    return image, text if text is None else _projected(at, text)


def prompt_apart(at: Site, o: Tensor, span: Span, extra: Tensor | None) -> Result:
    """As `to_both`, prompts third; without text the image stays unprojected (Flux)."""
    if span is None:
        return _parted(o, None, extra)
    image, text = to_both(at, o, span, None)
    return (image, text) if extra is None else (image, text, extra)


def raw_heads(at: Site, o: Tensor, span: Span, extra: Tensor | None) -> Pair:
    """``[B, S, H, D]``, unprojected (Lumina)."""
    image, text = _parted(o, span, extra)
    return image.unflatten(-1, (at.attn.heads, -1)), text


def grid_out(at: Site, o: Tensor, span: Span, extra: Tensor | None) -> Pair:
    """The projected, normed grid ``[B, C, height, width]`` with its residual (DC-AE)."""
    attn, x = at.attn, at.call.x
    image, text = _parted(o, span, extra)
    image = at.linear("to_out", image)
    if attn.norm_type == "rms_norm":
        grid = normed(at, image, x if attn.residual_connection else None)
        if grid is not None:
            return grid, text
    grid = image.unflatten(1, x.shape[2:])
    if attn.norm_type == "rms_norm":
        grid = attn.norm_out(grid).movedim(-1, 1)
    else:
        grid = attn.norm_out(grid.movedim(-1, 1))
    return grid + x if attn.residual_connection else grid, text


def _parted(o: Tensor, span: Span, extra: Tensor | None) -> Pair:
    """Image, with what prompts add to it, and text."""
    image, text = o, None
    if span is not None:
        start, stop = span
        image, text = o[:, start:stop], o[:, :start] if start else o[:, stop:]
    return image if extra is None else image + extra, text


def _projected(at: Site, x: Tensor) -> Tensor:
    layers = at.held("to_out")
    return x if layers is None else dropout(at, layers, at.linear("to_out", x))
