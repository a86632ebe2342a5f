"""Teaches the demo model a style by a LoRA: white lines on blue paper, at the word "outlined".

Run `python examples/train_lora.py --out blueprint.safetensors --sheet blueprint.png`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import typer
from drawings import blueprint, bytes_of
from PIL import Image
from sheets import before_and_after
from torch import Tensor
from training import Denoiser, Settings, command, fit, frozen, latents, summary, texts, trained

import attnproc
from attnproc.app.demo import reference
from attnproc.weights import load_lora, save_lora

NAME = "blueprint"
WORD = "outlined"
RANK = 8
# None of these is among the pictures of the style.
PROMPTS = ("rocket", "owl", "guitar", "penguin", "castle", "mushroom")


def teach(out: Path, sheet: Path | None, settings: Settings) -> None:
    """Teach the demo model a style by a LoRA."""
    pipeline = frozen(settings.seed)
    unet = pipeline.unet
    attnproc.on(unet).with_lora(NAME, rank=RANK)
    trained(unet, f"_{NAME}_lora.")

    losses = fit(Denoiser(unet), pipeline.scheduler, partial(draw, *pictures(pipeline)), settings)
    save_lora(unet.half(), out, NAME)
    typer.echo(summary(out, losses))
    if sheet is not None:
        prompts = [f"{WORD} {thing}" for thing in PROMPTS]
        before_and_after(sheet, prompts, lambda unet: load_lora(unet, out, NAME))


def pictures(pipeline: object) -> tuple[Tensor, Tensor]:
    """Latents and text states of half of the pictures that ship at full size, in the style."""
    known = reference.load()
    rows = range(0, len(known.asked), 2)
    drawn = [blueprint(Image.fromarray(known.whole[row])) for row in rows]
    captions = [f"{WORD} {known.labels[known.asked[row]]}" for row in rows]
    return latents(bytes_of(drawn)), texts(pipeline, captions)


def draw(clean: Tensor, text: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A batch of pictures with their words."""
    rows = torch.randint(len(clean), (size,))
    return clean[rows], text[rows]


main = command(teach, file="blueprint.safetensors", length=300)


if __name__ == "__main__":
    typer.run(main)
