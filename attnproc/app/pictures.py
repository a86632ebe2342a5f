"""Pictures out of results: enlarged, side by side, and sheets of attention maps."""

from __future__ import annotations

import io
import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from attnproc.capture import Maps

__all__ = ["difference", "enlarge", "sheet", "side_by_side"]

_TILE = 2.0
_PIXELS = 256
_COLUMNS = 6
_COLOURS = "inferno"


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
    figure, axes = _tiles(3, 1, size / 100, title)
    labels = ("diffusers", "attnproc", f"difference, at most {worst}/255")
    pictures = (enlarge(a, size), enlarge(b, size), Image.fromarray(shown.astype(np.uint8)))
    for ax, label, picture in zip(axes[0], labels, pictures, strict=True):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(label, fontsize=10)
    return _drawn(figure)


def sheet(pictures: Sequence[Image.Image], maps: Maps, title: str) -> Image.Image:
    """Each picture with the map of each word over it, a row or more a picture."""
    weights = _best(maps).float().cpu()  # [B, words, height, width]
    words = maps.words
    rows = math.ceil((len(words) + 1) / _COLUMNS)
    columns = math.ceil((len(words) + 1) / rows)
    figure, axes = _tiles(columns, rows * len(pictures), _TILE, title)
    for i, picture in enumerate(pictures):
        tiles = [ax for row in axes[i * rows : (i + 1) * rows] for ax in row]
        tiles[0].imshow(enlarge(picture, _PIXELS))
        tiles[0].set_title("picture", fontsize=10)
        for ax, word, weight in zip(tiles[1:], words, weights[i], strict=False):
            _overlay(ax, picture, weight.numpy())
            ax.set_title(textwrap.shorten(word, 20, placeholder="…"), fontsize=10, weight="bold")
        for ax in tiles[len(words) + 1 :]:
            ax.remove()
    return _drawn(figure)


def _best(maps: Maps) -> Tensor:
    """The mean over the layers with the most queries: coarser maps are noisy."""
    return maps.mean(tokens=max(total.shape[1] for total in maps.sums.values()))


def _overlay(ax: Any, picture: Image.Image, weight: np.ndarray[Any, Any]) -> None:
    """The picture in grey under a map ``[height, width]``, stretched to the full range."""
    side = _PIXELS
    span = float(np.ptp(weight)) or 1.0
    low = Image.fromarray(((weight - weight.min()) / span).astype(np.float32))
    heat = np.asarray(low.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    ax.imshow(enlarge(picture, side).convert("L"), cmap="gray", vmin=-80, vmax=255)
    ax.imshow(heat, cmap=_COLOURS, vmin=0, vmax=1, alpha=0.2 + 0.7 * heat)


def _tiles(columns: int, rows: int, side: float, title: str) -> tuple[Any, Any]:
    """A figure of square tiles without axes, `side` inches each."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(columns * side, rows * (side + 0.2) + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.suptitle(
        textwrap.shorten(title, int(columns * side * 9), placeholder=" …"), fontsize=12
    )
    return figure, axes


def _drawn(figure: Any) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white", bbox_inches="tight")
    return Image.open(file).convert("RGB")


def _levels(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(picture.convert("RGB")).astype(int)
