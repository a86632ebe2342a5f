"""Maps as one interactive page: a file that needs nothing else, also without a network.

Point at a word and its map lies over the picture; slide the step, choose the layer. Needs
matplotlib, for its colours, and pillow (`attnproc[viz]`).
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from .capture import Maps

__all__ = ["page", "save"]

_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*DATA*/"


def page(picture: Image, maps: Maps, title: str = "", *, row: int = 0) -> str:
    """The page's HTML.

    Args:
        picture: What is shown below the maps.
        maps: Captured maps; with ``each_step=True`` the page has a slider over the steps.
        title: Shown above.
        row: Which picture of the batch.
    """
    steps = min(len(kept) for kept in maps.taken.values()) if maps.each_step else 1
    layers = [_layer(maps, path, path, steps, row) for path in maps.taken]
    if len(layers) > 1:
        layers.insert(0, _layer(maps, "mean of all layers", "*", steps, row))
    numbered = [f"{i + 1} of {steps}" for i in range(steps)] if steps > 1 else []
    data = {
        "title": title,
        "picture": f"data:image/png;base64,{_text(_png(picture))}",
        "width": picture.width,
        "height": picture.height,
        "words": maps.words,
        "steps": ["mean of all", *numbered],
        "colours": _text(_colours()),
        "layers": layers,
    }
    # A "</script>" in the title must not end the script.
    return _TEMPLATE.read_text("utf-8").replace(_PLACE, json.dumps(data).replace("<", "\\u003c"))


def save(path: str | Path, picture: Image, maps: Maps, title: str = "", *, row: int = 0) -> None:
    """Writes `page` to a file."""
    Path(path).write_text(page(picture, maps, title, row=row), "utf-8")


def _layer(maps: Maps, name: str, pattern: str, steps: int, row: int) -> dict[str, Any]:
    """A layer's maps as bytes, on one scale a word."""
    each = [maps.mean(pattern)[row]]
    each += [maps.mean(pattern, step=i)[row] for i in range(steps)] if steps > 1 else []
    weights = torch.stack(each).float().cpu()  # [1 + steps, words, height, width]
    low, high = weights.amin(dim=(0, 2, 3)), weights.amax(dim=(0, 2, 3))
    span = torch.where(high > low, high - low, 1)[:, None, None]
    levels = ((weights - low[:, None, None]) / span * 255).round().to(torch.uint8)
    return {
        "name": name,
        "height": weights.shape[2],
        "width": weights.shape[3],
        "ranges": torch.stack((low, high), dim=-1).tolist(),
        "maps": _text(_bytes(levels)),
    }


def _bytes(levels: Tensor) -> bytes:
    return levels.contiguous().numpy().tobytes()


def _colours() -> bytes:
    """Red, green and blue of 256 levels."""
    from matplotlib import colormaps

    return bytes(round(255 * c) for i in range(256) for c in colormaps["inferno"](i)[:3])


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG", optimize=True)
    return file.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
