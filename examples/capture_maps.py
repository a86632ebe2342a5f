"""Where each word looked: maps of ten prompts, over layers and steps, and as a page.

    python examples/capture_maps.py --out maps

Ten pictures of the demo model, each with the maps of its words; then of one of them the maps layer
by layer, an animation over the steps, the components of self attention, a page to point at words
in, and the numbers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

import attnproc
from attnproc import html, plots
from attnproc.app.demo import model, vocabulary
from attnproc.capture import Components, Maps, components

PROMPTS = (
    "red octopus on a yellow background",
    "penguin on a blue background",
    "green turtle on a pink background",
    "rocket and pizza",
    "cat and umbrella",
    "robot and rose",
    "snowman and bicycle",
    "blue elephant",
    "purple guitar",
    "hamburger on a black background",
)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("maps"),
) -> None:
    """Makes the pictures and everything about them."""
    out.mkdir(parents=True, exist_ok=True)
    pipeline: Any = model.load()
    pipeline.set_progress_bar_config(disable=True)
    attnproc.swap(pipeline.unet)

    sheets: list[Image.Image] = []
    for prompt in PROMPTS:
        picture, maps = made(pipeline, prompt, each_step=prompt == PROMPTS[0])
        sheets.append(plots.sheet([picture], maps, prompt))
        if prompt == PROMPTS[0]:
            about(picture, maps, prompt, out)
    small(stacked(sheets, 2)).save(out / "ten-prompts.png", optimize=True)
    painted(pipeline, ("cat and umbrella", "penguin on a blue background")).save(
        out / "components.png"
    )


def made(pipeline: Any, prompt: str, each_step: bool = False) -> tuple[Image.Image, Maps]:
    """A picture and the maps of its words in all cross attention."""
    words = {word.text: word.token for word in vocabulary.words(prompt)}
    with attnproc.capture(pipeline.unet, words, each_step=each_step) as maps:
        picture = run(pipeline, prompt)
    return picture, maps


@torch.inference_mode()
def run(pipeline: Any, prompt: str) -> Image.Image:
    """Twenty steps from seed 0."""
    seed = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=20, guidance_scale=3.0, generator=seed).images[0]


def about(picture: Image.Image, maps: Maps, prompt: str, out: Path) -> None:
    """All other forms of one prompt's maps."""
    small(plots.layers(picture, maps, prompt)).save(out / "layers.png", optimize=True)
    plots.animation(picture, maps, out / "steps.gif")
    html.save(out / "maps.html", picture, maps, prompt)
    maps.save(out / "maps.npz")


def painted(pipeline: Any, prompts: Sequence[str]) -> Image.Image:
    """Pictures, and the components of the last layers of their self attention as colours."""
    found: list[Image.Image] = []
    for prompt in prompts:
        with components(pipeline.unet, "up_blocks.1.*", step=16) as kept:
            picture = run(pipeline, prompt)
        found += [picture.resize((256, 256), Image.Resampling.BICUBIC), *coloured(kept)]
    return stacked(found, len(found))


def coloured(kept: Components) -> list[Image.Image]:
    """A picture a layer."""
    return [plots.components(kept.of(layer)[0][0]) for layer in kept.pairs]


def stacked(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures row by row, each column as wide as its widest."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) for row in rows]
    widths = [max(p.width for p in pictures[i::columns]) for i in range(columns)]
    page = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            page.paste(picture, (sum(widths[:j]), sum(heights[:i])))
    return page


def small(page: Image.Image) -> Image.Image:
    """For a document."""
    return page.reduce(2)


if __name__ == "__main__":
    typer.run(main)
