"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Batch",
    "Custom",
    "Device",
    "Guidance",
    "Image",
    "Lora",
    "Pag",
    "Processor",
    "Prompt",
    "Reference",
    "Region",
    "Schedule",
    "Seed",
    "Size",
    "Steps",
]

Prompt = Annotated[str, typer.Argument(help='The words, such as "red heart".', show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first picture; others count on.")]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")]
Guidance = Annotated[
    float, typer.Option(min=1.0, help="Weight of the prompt against none; 1 turns guidance off.")
]
Batch = Annotated[int, typer.Option(min=1, max=64, help="How many pictures to make at a time.")]
Processor = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Run all attention on this processor (see `attnproc list`); "
        "by default each layer runs on its own processor's namesake.",
    ),
]
Size = Annotated[
    int, typer.Option(min=64, max=4096, help="Width and height of the written picture, in pixels.")
]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]

Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:WEIGHT]", help="Low-rank updates of attention (LoRA); may be given again."
    ),
]
Custom = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Projections of cross attention (Custom Diffusion)."),
]
Image = Annotated[
    str | None,
    typer.Option(metavar="PICTURE[:SCALE]", help="A picture that steers the colours and shapes."),
]
Pag = Annotated[
    float,
    typer.Option(min=0.0, help="Weight of perturbed-attention guidance; 0 turns it off."),
]
Region = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORDS:BOX",
        help="Words for a part of the picture, left,top,right,bottom in fractions, as in "
        '"cat:0,0,0.5,1"; the prompt lays out the whole and holds for the rest. May be given '
        "again.",
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(metavar="PICTURE", help="A picture that the new one looks at while it is made."),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        metavar="BEGIN,END",
        help="During which part of the steps word weights, regions and reference hold, as in "
        "0,0.6.",
    ),
]
