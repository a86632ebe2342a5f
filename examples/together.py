"""A LoRA, a picture and perturbed guidance on the demo model, each alone and all together.

It draws what `attnproc generate --lora FILE --image PICTURE --pag 3` draws.

Run `python examples/together.py --lora blueprint.safetensors --out together.png`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from drawings import bands
from PIL import Image
from sheets import page, painted

import attnproc
from attnproc.app import adapters
from attnproc.app.demo import model

PROMPTS = ("outlined rocket", "outlined owl", "outlined castle", "outlined mushroom")
COLOURS = ("yellow", "orange", "red")
LORA = Path(__file__).parent / "weights" / "blueprint.safetensors"


def main(
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("together.png"),
    lora: Annotated[Path, typer.Option(help="The file of `train_lora.py`.")] = LORA,
) -> None:
    """Draw prompts with a LoRA, with a picture, with guidance, and with all of them."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "sun.png"
        bands(*COLOURS).save(picture)
        style: dict[str, Any] = {"loras": [f"{lora}:0.9"]}
        colours: dict[str, Any] = {"image": f"{picture}:0.8"}
        pag: dict[str, Any] = {"pag": 3.0}
        parts: dict[str, dict[str, Any]] = {
            "nothing": {},
            "--lora": style,
            "--image": colours,
            "--pag": pag,
            "lora, image": style | colours,
            "all three": style | colours | pag,
        }
        rows = {name: drawn(**given) for name, given in parts.items()}
    page(out, PROMPTS, rows)


def drawn(
    loras: tuple[str, ...] = (), image: str | None = None, pag: float = 0.0
) -> list[Image.Image]:
    """The prompts with what is given, as `attnproc generate` draws them."""
    given = adapters.read(loras, None, image, pag)
    pipeline = model.load()
    attnproc.swap(pipeline.unet)
    return painted(given.put_on(pipeline), PROMPTS, **given.inputs(3.0))


if __name__ == "__main__":
    typer.run(main)
