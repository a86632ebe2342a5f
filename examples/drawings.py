"""What the demo model is taught, drawn by code: a character that no emoji has, and a style."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from attnproc.app.demo.palette import GROUNDS

__all__ = ["bands", "beside", "blueprint", "bytes_of", "critter"]

SIDE = 64
# Drawn larger and made small again, so that edges are smooth.
FINE = 8
PAPER, LINES = np.array((18, 52, 120.0)), np.array((255, 255, 255.0))


def critter(ground: str = "white", lean: float = 0.0, height: float = 1.0) -> Image.Image:
    """A teal cone with one eye, a pink ball on top and orange feet.

    Args:
        ground: Name of the colour behind it.
        lean: Degrees by which it leans to the left.
        height: Factor on its height.
    """
    page = Image.new("RGB", (SIDE * FINE, SIDE * FINE), GROUNDS[ground])
    draw = ImageDraw.Draw(page)

    def at(*points: float) -> list[float]:
        """Points of a grid of 64, from the feet up."""
        pairs = zip(points[::2], points[1::2], strict=True)
        return [c * FINE for x, y in pairs for c in (x, 56 - (56 - y) * height)]

    for x in (17, 35):
        draw.ellipse(at(x, 51, x + 13, 60), fill=(245, 130, 20))
    draw.polygon(at(32, 12, 55, 55, 9, 55), fill=(20, 160, 165))
    draw.polygon(at(32, 12, 43.5, 33.5, 20.5, 33.5), fill=(60, 190, 190))
    draw.ellipse(at(25, 4, 39, 18), fill=(245, 105, 170))
    draw.ellipse(at(21, 28, 43, 50), fill=(255, 255, 255))
    draw.ellipse(at(27, 34, 38, 45), fill=(20, 20, 20))
    turned = page.rotate(lean, Image.Resampling.BICUBIC, fillcolor=GROUNDS[ground])
    return turned.resize((SIDE, SIDE), Image.Resampling.BOX)


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures at half size, side by side on white, as the model knows pairs."""
    page = Image.new("RGB", (SIDE, SIDE), "white")
    for column, picture in enumerate((left, right)):
        page.paste(picture.reduce(2), (column * SIDE // 2, SIDE // 4))
    return page


def bands(*colours: str) -> Image.Image:
    """Bands of colours, from top to bottom."""
    column = np.array([[GROUNDS[colour]] for colour in colours], np.uint8)
    return Image.fromarray(column).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def blueprint(picture: Image.Image) -> Image.Image:
    """The picture's edges as white lines on blue paper."""
    smooth = picture.convert("RGB").filter(ImageFilter.GaussianBlur(0.6))
    steps = ImageChops.difference(
        smooth.filter(ImageFilter.MaxFilter(3)), smooth.filter(ImageFilter.MinFilter(3))
    )
    edges = np.asarray(steps).max(axis=2, keepdims=True) / 255.0
    ink = np.clip(1.6 * edges - 0.15, 0, 1)
    return Image.fromarray((PAPER + ink * (LINES - PAPER)).astype(np.uint8))


def bytes_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as bytes ``[N, 64, 64, 3]``."""
    return torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures]))
