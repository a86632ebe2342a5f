"""Projections of the result.

Each takes the image ``[B, S, H*D]``, the text ``[B, T, H*D]`` or None, and what image prompts add
to the image, or None; it returns image, text and, where the family returns them apart, prompts.
"""

from __future__ import annotations

from torch import Tensor

from .linears import linear
from .types import Site

__all__ = ["grid_out", "prompt_apart", "raw_heads", "to_both", "to_out", "to_out_shared"]


def to_out(at: Site, image: Tensor, text: Tensor | None, extra: Tensor | None) -> tuple:
    """The image's output projection, where the module has one; the text as it is."""
    return _image(at, image if extra is None else image + extra), text


def to_both(at: Site, image: Tensor, text: Tensor | None, extra: Tensor | None) -> tuple:
    """Each stream's own output projection, where the module has one."""
    image, _ = to_out(at, image, None, extra)
    if text is not None and getattr(at.attn, "to_add_out", None) is not None:
        text = linear(at, "to_add_out", text)
    return image, text


def to_out_shared(at: Site, image: Tensor, text: Tensor | None, extra: Tensor | None) -> tuple:
    """One output projection for both streams."""
    image, _ = to_out(at, image, None, extra)
    return image, text if text is None else _image(at, text)


def prompt_apart(at: Site, image: Tensor, text: Tensor | None, extra: Tensor | None) -> tuple:
    """As `to_both`, prompts third; without text the image stays unprojected (Flux)."""
    if text is None:
        return image if extra is None else image + extra, None
    both = to_both(at, image, text, None)
    return both if extra is None else (*both, extra)


def raw_heads(at: Site, image: Tensor, text: Tensor | None, extra: Tensor | None) -> tuple:
    """``[B, S, H, D]``, unprojected (Lumina)."""
    image = image if extra is None else image + extra
    return image.unflatten(-1, (at.attn.heads, -1)), text


def grid_out(at: Site, image: Tensor, text: Tensor | None, extra: Tensor | None) -> tuple:
    """The projected, normed grid ``[B, C, height, width]`` with its residual (DC-AE)."""
    attn, x = at.attn, at.call.x
    image = image if extra is None else image + extra
    grid = linear(at, "to_out", image).unflatten(1, x.shape[2:])
    if attn.norm_type == "rms_norm":
        grid = attn.norm_out(grid).movedim(-1, 1)
    else:
        grid = attn.norm_out(grid.movedim(-1, 1))
    return grid + x if attn.residual_connection else grid, text


def _image(at: Site, x: Tensor) -> Tensor:
    if getattr(at.attn, "to_out", None) is None:
        return x
    return linear(at, "to_out.1", linear(at, "to_out.0", x))
