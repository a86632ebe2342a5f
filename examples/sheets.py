"""Sheets of pictures by the demo model: without and with what it was taught."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from attnproc.app.demo import model

__all__ = ["before_and_after", "page", "painted"]

SIDE, MARGIN, LINE, LABEL = 160, 8, 18, 90
STEPS, GUIDANCE = 20, 3.0


def before_and_after(
    path: Path, prompts: Sequence[str], put_on: Callable[[nn.Module], Any], seed: int = 0
) -> None:
    """Draws prompts without and with what `put_on` puts on the U-Net."""
    pipeline = model.load()
    before = painted(pipeline, prompts, seed)
    put_on(pipeline.unet)
    page(path, prompts, {"before": before, "after": painted(pipeline, prompts, seed)})


def painted(
    pipeline: Any, prompts: Sequence[str], seed: int = 0, guidance: float = GUIDANCE, **inputs: Any
) -> list[Image.Image]:
    """One picture a prompt, all from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(seed) for _ in prompts]
    given = {"num_inference_steps": STEPS, "guidance_scale": guidance, "generator": noise}
    return pipeline(list(prompts), **given, **inputs).images


def page(
    path: Path, titles: Sequence[str], rows: Mapping[str, Sequence[Image.Image | None]]
) -> None:
    """Writes rows of pictures with a title over each column and a label before each row."""
    step = SIDE + MARGIN
    sheet = Image.new("RGB", (LABEL + len(titles) * step, LINE + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((LABEL + column * step + SIDE / 2, 3), title, fill="black", anchor="ma")
    for row, (label, pictures) in enumerate(rows.items()):
        top = LINE + row * step
        draw.text((LABEL - 6, top + SIDE / 2), label, fill="black", anchor="rm")
        for column, picture in enumerate(pictures):
            if picture is not None:
                large = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                sheet.paste(large, (LABEL + column * step, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256).save(path, optimize=True)
