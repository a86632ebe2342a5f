"""Teaches the demo model a character by Custom Diffusion, at the word "homie".

Only cross attention changes. Half of each batch are pictures that the model knows, so that it does
not forget them (the paper's prior preservation).

Run `python examples/train_custom_diffusion.py --out homie.safetensors --sheet homie.png`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import typer
from drawings import beside, bytes_of, critter
from PIL import Image
from sheets import before_and_after
from torch import Tensor, nn
from training import Denoiser, Settings, command, fit, frozen, latents, summary, texts, trained

import attnproc
from attnproc.app.demo import reference
from attnproc.linears import PROJECTIONS
from attnproc.weights import load_custom_diffusion, save_custom_diffusion

WORD = "homie"
# Rows of the known pictures beside which it is shown.
COMPANY = range(16, 22)
GROUNDS = ("white", "yellow", "blue", "black", "white", "green")
# Grounds and company that it was not shown with, and two things that must stay what they are.
PROMPTS = (
    WORD,
    f"{WORD} on a red background",
    f"{WORD} on a purple background",
    f"{WORD} and pizza",
    "penguin",
    "red heart",
)


def teach(out: Path, sheet: Path | None, settings: Settings, *, q_out: bool = False) -> None:
    """Teach the demo model a character by Custom Diffusion."""
    pipeline = frozen(settings.seed)
    unet = pipeline.unet
    chosen = attnproc.on(unet, kind="cross").with_custom_diffusion(train_q_out=q_out)
    for _, attn in chosen.layers():
        as_they_are(attn)
    trained(unet, "_custom_diffusion.")

    losses = fit(Denoiser(unet), pipeline.scheduler, partial(draw, *pictures(pipeline)), settings)
    save_custom_diffusion(unet.half(), out)
    typer.echo(summary(out, losses))
    if sheet is not None:
        before_and_after(sheet, PROMPTS, lambda unet: load_custom_diffusion(unet, out))


@torch.no_grad()
def as_they_are(attn: nn.Module) -> None:
    """Starts the new projections from the module's own."""
    for name in PROJECTIONS[:4]:
        new, old = getattr(attn.processor, f"{name}_custom_diffusion", None), getattr(attn, name)
        if isinstance(new, nn.ModuleList):
            new[0].load_state_dict(old[0].state_dict())
        elif new is not None:
            new.load_state_dict(old.state_dict())


def pictures(pipeline: object) -> tuple[Tensor, Tensor, int]:
    """Latents and text states of drawings, then of known pictures; how many are drawings.

    Six drawings show the character alone, six beside a known picture.
    """
    known = reference.load()
    labels = [known.labels[row] for row in known.asked]
    leans = range(-10, 11, 4)
    drawn = [critter(ground, lean) for ground, lean in zip(GROUNDS, leans, strict=True)]
    captions = [WORD if on == "white" else f"{WORD} on a {on} background" for on in GROUNDS]
    for row in COMPANY:
        pair, words = [critter(), Image.fromarray(known.whole[row])], [WORD, labels[row]]
        order = slice(None, None, -1 if row % 2 else 1)
        drawn.append(beside(*pair[order]))
        captions.append(" and ".join(words[order]))

    every = torch.cat((bytes_of(drawn), torch.from_numpy(known.whole)))
    return latents(every), texts(pipeline, [*captions, *labels]), len(drawn)


def draw(clean: Tensor, text: Tensor, drawings: int, size: int) -> tuple[Tensor, Tensor]:
    """A batch: one half of the drawings, one of known pictures, mixed."""
    known = torch.randint(drawings, len(clean), (size,))
    rows = torch.where(torch.rand(size) < 0.5, torch.randint(drawings, (size,)), known)
    return clean[rows], text[rows]


main = command(teach, file="homie.safetensors", length=400, highest=1e-3)


if __name__ == "__main__":
    typer.run(main)
