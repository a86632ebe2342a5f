"""Steering the demo model: regions, edits, word weights, a reference, perturbed guidance.

    python examples/steering.py --out steered

Each row of a sheet begins with the picture as it is without.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor

import attnproc
from attnproc import Layers
from attnproc.app.demo import model
from attnproc.app.demo.vocabulary import LENGTH, split
from attnproc.app.reference import Noised
from attnproc.places import Box
from attnproc.steering import Region, align

LEFT, RIGHT = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
# Of both halves, the left one, the right one; width of the edge.
HALVES = (
    ("octopus", "octopus on a yellow background", "octopus on a blue background", 0.0),
    ("apple", "red apple", "green apple", 0.3),
    ("cat and umbrella", "blue cat", "red umbrella", 0.0),
    ("apple and octopus", "red apple", "green octopus", 0.0),
    ("snowman and bicycle", "snowman on a green background", "bicycle on a pink background", 0.0),
    ("cat and umbrella", "umbrella", "cat", 0.0),
)
EDITS = (
    ("red heart", "blue heart"),
    ("rocket", "blue rocket"),
    ("cat and umbrella", "cat and rose"),
    ("green apple on a yellow background", "green pear on a yellow background"),
    ("cat", "dog"),
)
# How far the prompt for the whole is seen in the halves.
BASES = (0.0, 0.1)
# Cross attention until, self attention until, as fractions of the steps.
KEPT = ((0.8, 0.0), (0.8, 0.4), (1.0, 0.8))
WEIGHTS = (0.0, 0.5, 1.5, -1.0)
REFERENCES: tuple[dict[str, Any], ...] = (
    {"mode": "append"},
    {"mode": "append", "normed": True},
    {"mode": "replace"},
)

Tile = tuple[Image.Image, str]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("steered"),
) -> None:
    """Draws the sheets."""
    out.mkdir(parents=True, exist_ok=True)
    pipeline: Any = model.load()
    pipeline.set_progress_bar_config(disable=True)
    layers = attnproc.on(pipeline.unet)
    page([halves(pipeline, layers, *row) for row in HALVES], out / "regions.png")
    page([edits(pipeline, layers, *pair) for pair in EDITS], out / "edits.png")
    page([weights(pipeline, layers)], out / "word-weights.png")
    file = out / "reference.png"
    run(pipeline, ["purple octopus on a green background"])[0].save(file)
    page([references(pipeline, layers, file)], out / "references.png")


def halves(
    pipeline: Any, layers: Layers, whole: str, left: str, right: str, soft: float
) -> list[Tile]:
    """A prompt for the whole and one for each half, by themselves and together."""
    prompts = (whole, left, right)
    found = [(run(pipeline, [text])[0], text) for text in prompts]
    pairs = [pipeline.encode_prompt(text, "cpu", 1, True) for text in prompts]
    words, empty = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
    spans = [(i * LENGTH, (i + 1) * LENGTH) for i in range(3)]
    regions = [
        Region(*span, box, soft) for span, box in zip(spans, (None, LEFT, RIGHT), strict=True)
    ]
    for base in BASES:
        layers.with_regions(*regions, base=base)
        picture = run(pipeline, None, prompt_embeds=words, negative_prompt_embeds=empty)[0]
        found.append((picture, f"base {base:g}"))
        layers.without("regions", missing=True)
    return found


def edits(pipeline: Any, layers: Layers, first: str, second: str) -> list[Tile]:
    """Two prompts by themselves, then the second with more and more of the first's layout."""
    alone = both(pipeline, layers, first, second)
    found = [(alone[0], first), (alone[1], second)]
    alignment = align(split(first), split(second), length=LENGTH)
    for words, shapes in KEPT:
        layers.with_prompt_to_prompt(
            alignment,
            strength=layers.schedule(1.0, 0.0, words),
            self_strength=layers.schedule(1.0 if shapes else 0.0, 0.0, shapes),
        )
        picture = both(pipeline, layers, first, second)[1]
        found.append((picture, f"words {words:g}, shapes {shapes:g}"))
        layers.without("prompt_to_prompt", missing=True)
    return found


def weights(pipeline: Any, layers: Layers, prompt: str = "red octopus") -> list[Tile]:
    """The first word of a prompt with several weights."""
    found = [(run(pipeline, [prompt])[0], prompt)]
    for weight in WEIGHTS:
        layers.with_word_weights({1: weight})
        found.append((run(pipeline, [prompt])[0], f"(red:{weight:g}) octopus"))
        layers.without("words", missing=True)
    return found


def references(pipeline: Any, layers: Layers, file: Path) -> list[Tile]:
    """A picture that looks at another one, in several ways."""
    found = [(Image.open(file), "reference"), (run(pipeline, ["rocket"])[0], "rocket")]
    for options in REFERENCES:
        layers.with_reference(**options)
        # The first row is the reference, noised as far as the rocket at each step.
        hook = Noised.read(file, pipeline)
        picture = run(pipeline, ["", "rocket"], callback_on_step_end=hook)[1]
        found.append((picture, ", ".join(f"{k}={v}" for k, v in options.items())))
        layers.without("reference", missing=True)
    return found


def both(pipeline: Any, layers: Layers, first: str, second: str) -> list[Image.Image]:
    """Two prompts from the same noise."""
    layers.clock.set(0.0)
    noise = torch.randn(1, 12, 32, 32, generator=torch.Generator().manual_seed(3))
    return run(
        pipeline,
        [first, second],
        latents=noise.repeat(2, 1, 1, 1),
        callback_on_step_end=layers.clock.on_step_end,
    )


@torch.inference_mode()
def run(pipeline: Any, prompts: Sequence[str] | None, **given: Tensor | Any) -> list[Image.Image]:
    """Twenty steps from seed 0."""
    seeds = [torch.Generator().manual_seed(0) for _ in prompts or (None,)]
    given = {"generator": seeds, "num_inference_steps": 20, "guidance_scale": 3.0, **given}
    return pipeline(prompts, **given).images


def page(rows: Sequence[Sequence[Tile]], path: Path, side: int = 176) -> None:
    """Rows of pictures under their labels."""
    width = max(map(len, rows)) * side
    sheet = Image.new("RGB", (width, len(rows) * (side + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (picture, label) in enumerate(row):
            at = (j * side, i * (side + 16))
            sheet.paste(
                picture.resize((side, side), Image.Resampling.BICUBIC), (at[0], at[1] + 16)
            )
            draw.text((at[0] + side / 2, at[1] + 2), label[:30], fill="black", anchor="ma")
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
