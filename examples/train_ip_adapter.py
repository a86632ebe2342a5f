"""Trains an image prompt for the demo model (IP-Adapter): a given picture steers the result.

The image encoder takes the picture's palette, from top to bottom. The colours of the training
pictures are shuffled, so that the words can't tell them and the picture has to.

Run `python examples/train_ip_adapter.py --out image.safetensors --sheet image.png`.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import typer
from drawings import bands, bytes_of, critter
from PIL import Image
from sheets import page, painted
from torch import Tensor, nn
from training import Denoiser, Settings, command, fit, frozen, latents, summary, texts, trained

import attnproc
from attnproc.app.demo import model, reference
from attnproc.app.image_prompt import WIDTH, embeddings, put_on
from attnproc.interop import processors
from attnproc.weights import save_ip_adapter

TOKENS = 4
# Below this noise step details are drawn, which small pictures lack.
LOWEST = 300
SCALE = 0.8
PROMPTS = ("cat", "rocket", "house", "heart", "guitar")


class Projection(nn.Module):
    """Tokens of image embeddings, in the published layout: one linear layer and a norm."""

    def __init__(self, wide: int, width: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Linear(wide, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embeds: Tensor) -> Tensor:
        """``[B, E]`` to ``[B, tokens, width]``."""
        return self.norm(self.proj(embeds).unflatten(1, (-1, self.norm.normalized_shape[0])))


class Pictures:
    """The reference pictures in random colours, with their words or without.

    Args:
        pipeline: The demo model, for its text encoder.
    """

    def __init__(self, pipeline: object) -> None:
        known = reference.load()
        large = [Image.fromarray(small).resize((64, 64), 3) for small in known.small]
        self.pictures = torch.from_numpy(np.stack([np.asarray(picture) for picture in large]))
        self.texts = texts(pipeline, [*known.labels, ""])
        self.orders = torch.tensor(list(permutations(range(3))))

    def draw(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, text states (three in ten of no words) and embeddings (a tenth 0)."""
        rows = torch.randint(len(self.pictures), (size,))
        pictures = self._coloured(self.pictures[rows].float())
        words = torch.where(torch.rand(size) < 0.7, rows, torch.tensor(len(self.pictures)))
        kept = torch.rand(size, 1) < 0.9
        return latents(pictures), self.texts[words], embeddings(pictures) * kept

    def _coloured(self, pictures: Tensor) -> Tensor:
        """Channels in another order, and half of the pictures as through coloured glass."""
        orders = self.orders[torch.randint(len(self.orders), (len(pictures),))]
        pictures = pictures.gather(3, orders[:, None, None].expand_as(pictures))
        glass = 1 - torch.rand(len(pictures), 1, 1, 3) * (torch.rand(len(pictures), 1, 1, 1) < 0.5)
        return pictures * glass


def teach(out: Path, sheet: Path | None, settings: Settings) -> None:
    """Train an image prompt for the demo model."""
    pipeline = frozen(settings.seed)
    unet = pipeline.unet
    width = unet.config.cross_attention_dim
    attnproc.on(unet, kind="cross").with_ip_adapter(width, TOKENS)
    as_for_words(unet)
    trained(unet, "_ip.")
    projection = Projection(WIDTH, width, TOKENS)

    losses = fit(Denoiser(unet, projection), pipeline.scheduler, Pictures(pipeline).draw, settings)
    save_ip_adapter(unet.half(), out, projection.half().state_dict())
    typer.echo(summary(out, losses))
    if sheet is not None:
        draw_sheet(sheet, out)


def draw_sheet(path: Path, file: Path) -> None:
    """Draws the same prompts steered by different pictures."""
    pipeline = model.load()
    rows: dict[str, list[Image.Image | None]] = {"none": [None, *painted(pipeline, PROMPTS)]}
    put_on(pipeline.unet, SCALE, file)
    for name, picture in given().items():
        embeds = embeddings(bytes_of([picture]))
        both = torch.stack((torch.zeros_like(embeds), embeds))
        pictures = painted(pipeline, PROMPTS, ip_adapter_image_embeds=[both])
        rows[name] = [picture, *pictures]
    page(path, ["picture", *PROMPTS], rows)


def given() -> dict[str, Image.Image]:
    """Pictures that the prompt was not trained on, and one of those it was."""
    known = reference.load()
    small = Image.fromarray(known.small[known.row("watermelon")])
    return {
        "bands": bands("pink", "purple", "teal"),
        "night": bands("black", "blue"),
        "sun": bands("yellow", "orange", "red"),
        "critter": critter("green"),
        "watermelon": small.resize((64, 64), Image.Resampling.BICUBIC),
    }


@torch.no_grad()
def as_for_words(unet: nn.Module) -> None:
    """Starts the prompt's keys and values from those of the text."""
    for _, attn in processors(unet):
        for ours, theirs in (("to_k_ip", attn.to_k), ("to_v_ip", attn.to_v)):
            for layer in getattr(attn.processor, ours, ()):
                layer.weight.copy_(theirs.weight)


main = command(teach, file="image.safetensors", length=400, pictures=16, lowest=LOWEST)


if __name__ == "__main__":
    typer.run(main)
