"""Pictures of attention maps: over the picture, by layer, over the steps, and of components.

Needs matplotlib and pillow (`attnproc[viz]`).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from torch import Tensor

    from .capture import Maps

__all__ = ["animation", "components", "drawn", "layers", "overlay", "sheet", "tiles"]

_TILE = 2.0
_PIXELS = 256
_COLUMNS = 6
_COLOURS = "inferno"

Array = np.ndarray[Any, Any]


def sheet(pictures: Sequence[Image.Image], maps: Maps, title: str = "") -> Image.Image:
    """Each picture with the map of each word over it, a row or more a picture.

    Args:
        pictures: As many as the maps' batch.
        maps: Captured maps; those of the layers with the most queries are shown, since coarser
            ones are noisy.
        title: Shown above.
    """
    weights = maps.mean(tokens=_finest(maps)).float().cpu()  # [B, words, height, width]
    words = maps.words
    rows = math.ceil((len(words) + 1) / _COLUMNS)
    columns = math.ceil((len(words) + 1) / rows)
    figure, axes = tiles(columns, rows * len(pictures), _TILE, title)
    for i, picture in enumerate(pictures):
        row = [ax for axs in axes[i * rows : (i + 1) * rows] for ax in axs]
        _show(row[0], _large(picture), "picture", weight="normal")
        for ax, word, weight in zip(row[1:], words, weights[i], strict=False):
            _show(ax, overlay(picture, weight), word)
        for ax in row[len(words) + 1 :]:
            ax.remove()
    return drawn(figure)


def layers(picture: Image.Image, maps: Maps, title: str = "", *, row: int = 0) -> Image.Image:
    """The map of each word in each layer: a row a layer, a column a word.

    Args:
        picture: What is shown below the maps.
        maps: Captured maps.
        title: Shown above.
        row: Which picture of the batch.
    """
    paths, words = list(maps.taken), maps.words
    figure, axes = tiles(len(words), len(paths), _TILE, title, left=1.6)
    for path, axs in zip(paths, axes, strict=True):
        weights = maps.mean(path)[row].float().cpu()
        for ax, word, weight in zip(axs, words, weights, strict=True):
            _show(ax, overlay(picture, weight), word if path == paths[0] else "")
        label = f"{_short(path)}\n{weights.shape[1]} x {weights.shape[2]}"
        axs[0].text(-0.05, 0.5, label, transform=axs[0].transAxes, ha="right", va="center")
    return drawn(figure)


def animation(
    picture: Image.Image, maps: Maps, path: str | Path, *, row: int = 0, seconds: float = 0.15
) -> None:
    """Writes the maps of all words over the steps as a GIF or an animated PNG.

    All steps of a word share one scale.

    Args:
        picture: What is shown below the maps.
        maps: Maps captured with ``each_step=True``.
        path: A ``.gif`` or ``.png`` file.
        row: Which picture of the batch.
        seconds: How long a step is shown.

    Raises:
        ValueError: The steps were not kept apart, or the name ends in something else.
    """
    path = Path(path)
    if not maps.each_step:
        raise ValueError("maps: the steps were summed; capture with each_step=True")
    if path.suffix not in (".gif", ".png"):
        raise ValueError(f"path is {path}: give a name that ends in .gif or .png")
    count = min(len(kept) for kept in maps.taken.values())
    fine = _finest(maps)
    steps = np.stack([maps.mean(tokens=fine, step=i)[row].float().cpu() for i in range(count)])
    low, high = steps.min(axis=(0, 2, 3)), steps.max(axis=(0, 2, 3))
    frames = [
        _strip(picture, maps.words, weights, f"step {i + 1} of {count}", low, high)
        for i, weights in enumerate(steps)
    ]
    options: dict[str, Any] = {"duration": round(1000 * seconds), "loop": 0}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


def components(places: Tensor, size: int = _PIXELS) -> Image.Image:
    """Three components of a self-attention map as red, green and blue.

    Args:
        places: ``[3, height, width]``, as `Components.of` gives it for one picture.
        size: Width and height in pixels.
    """
    low, high = np.percentile(places.float().cpu().numpy(), (1, 99), axis=(1, 2), keepdims=True)
    span = np.where(high > low, high - low, 1)
    levels = ((places.float().cpu().numpy() - low) / span).clip(0, 1) * 255
    picture = Image.fromarray(levels.transpose(1, 2, 0).round().astype(np.uint8))
    return picture.resize((size, size), Image.Resampling.NEAREST)


def overlay(
    picture: Image.Image,
    weight: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    size: int = _PIXELS,
) -> Image.Image:
    """A picture in grey under one map.

    Args:
        picture: The picture.
        weight: The map ``[height, width]``.
        low: What is shown as nothing; None is the map's least weight.
        high: What is shown as the brightest; None is the map's largest weight.
        size: Width and height of the result in pixels.
    """
    from matplotlib import colormaps

    weight = np.asarray(weight, dtype=np.float32)
    least = float(weight.min()) if low is None else low
    most = float(weight.max()) if high is None else high
    scaled = Image.fromarray((weight - least) / ((most - least) or 1.0))
    heat = np.asarray(scaled.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    grey = np.asarray(_large(picture, size).convert("L"), dtype=np.float32)[..., None]
    under = (80 + grey) / 335
    shown = colormaps[_COLOURS](heat[..., 0])[..., :3]
    alpha = 0.2 + 0.7 * heat
    return Image.fromarray(((under * (1 - alpha) + shown * alpha) * 255).astype(np.uint8))


def tiles(
    columns: int, rows: int, side: float, title: str, *, left: float = 0.0
) -> tuple[Any, Any]:
    """A figure of square tiles without axes, `side` inches each, with room to their left."""
    from matplotlib.figure import Figure

    size = (columns * side + left, rows * (side + 0.2) + 0.4)
    figure: Any = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    width = max(20, int(columns * side * 9))
    figure.suptitle(textwrap.shorten(title, width, placeholder=" …"), fontsize=12)
    return figure, axes


def drawn(figure: Any) -> Image.Image:
    """A figure as a picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white", bbox_inches="tight")
    return Image.open(file).convert("RGB")


def _show(ax: Any, picture: Image.Image, title: str, weight: str = "bold") -> None:
    ax.imshow(picture)
    ax.set_title(textwrap.shorten(title, 20, placeholder="…"), fontsize=10, weight=weight)


def _strip(
    picture: Image.Image, words: Sequence[str], weights: Array, title: str, low: Array, high: Array
) -> Image.Image:
    """The maps of one step in a row, under their words."""
    side, top = 160, 20
    strip = Image.new("RGB", (side * len(words), side + 2 * top), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((4, 4), title, fill="black")
    for i, (word, weight) in enumerate(zip(words, weights, strict=True)):
        tile = overlay(picture, weight, low=low[i], high=high[i], size=side)
        strip.paste(tile, (i * side, 2 * top))
        draw.text(((i + 0.5) * side, top + 4), word, fill="black", anchor="ma")
    return strip


def _finest(maps: Maps) -> int:
    """How many tokens the largest of the maps' grids has."""
    return max(maps.mean(path).shape[-2:].numel() for path in maps.taken)


def _large(picture: Image.Image, size: int = _PIXELS) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def _short(path: str) -> str:
    """A layer's path without what all paths of a U-Net share."""
    left_out = ("attentions", "transformer_blocks", "processor")
    return ".".join(part for part in path.split(".") if part not in left_out)
