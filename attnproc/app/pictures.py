"""Pictures out of results: enlarged, side by side, and sheets of attention maps."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from attnproc.plots import drawn, sheet, tiles

__all__ = ["difference", "enlarge", "sheet", "side_by_side"]


def enlarge(picture: Image.Image, size: int) -> Image.Image:
    """The picture in `size` pixels a side."""
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures in any channel, of 255."""
    return int(np.abs(_levels(a) - _levels(b)).max())


def side_by_side(a: Image.Image, b: Image.Image, size: int, title: str) -> Image.Image:
    """Both pictures with their difference, which is stretched to the full range."""
    apart = np.abs(_levels(a) - _levels(b))
    worst = int(apart.max())
    shown = apart * (255 // max(worst, 1))
    figure, axes = tiles(3, 1, size / 100, title)
    labels = ("diffusers", "attnproc", f"difference, at most {worst}/255")
    pictures = (enlarge(a, size), enlarge(b, size), Image.fromarray(shown.astype(np.uint8)))
    for ax, label, picture in zip(axes[0], labels, pictures, strict=True):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(label, fontsize=10)
    return drawn(figure)


def _levels(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(picture.convert("RGB")).astype(int)
