"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Batch", "Device", "Guidance", "Processor", "Prompt", "Seed", "Size", "Steps"]

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
