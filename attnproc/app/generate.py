"""`attnproc generate`: words to a picture, and where each word looked."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnproc.app import files
from attnproc.app.checks import prepare
from attnproc.app.options import Batch, Device, Guidance, Processor, Prompt, Seed, Size, Steps
from attnproc.app.painting import Clock, Request, load, paint, progress
from attnproc.app.terminal import say

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from attnproc.capture import Maps

__all__ = ["generate"]


def generate(
    prompt: Prompt,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the picture, a .png file.")
    ] = Path("picture.png"),
    maps: Annotated[
        bool, typer.Option("--maps", help="Also write OUT-maps.png: where each word looked.")
    ] = False,
    seed: Seed = 0,
    steps: Steps = 20,
    guidance: Guidance = 3.0,
    batch: Batch = 1,
    processor: Processor = None,
    size: Size = 512,
    device: Device = "cpu",
) -> None:
    """Make a picture from words.

    It is drawn by the small model that ships with attnproc, which knows things, tints and
    coloured backgrounds: "red octopus on a yellow background". Its attention runs on attnproc.
    """
    clock = Clock()
    targets, sheet = files.numbered(out, batch), out.with_stem(f"{out.stem}-maps")
    known = prepare(prompt, [*targets, *([sheet] if maps else [])], processor)
    request = Request(known.text, seed, steps, guidance, batch)
    with progress(steps) as stage:
        pipeline = load(device)
        from attnproc.app import fitting, pictures

        ran = fitting.install(pipeline.unet, processor, guidance=guidance)
        ready = clock.seconds
        with _captured(pipeline.unet, known.positions if maps else None, guidance) as seen:
            painted = paint(pipeline, request, stage("painting"))

    for picture, path in zip(painted, targets, strict=True):
        files.save(pictures.enlarge(picture, size), path)
    if seen is not None:
        files.save(pictures.sheet(painted, seen, known.text), sheet)
    where = files.shown(targets) + (f" and {sheet}" if maps else "")
    say(f"{where}: {request}; {ran}; {clock.seconds:.1f} s, {ready:.1f} s of them to load")


def _captured(
    unet: UNet2DConditionModel, positions: Mapping[str, int] | None, guidance: float
) -> AbstractContextManager[Maps | None]:
    """Capture of the words' maps in cross attention, of the rows that see the prompt."""
    if positions is None:
        return nullcontext()
    from attnproc.capture import capture

    return capture(unet, positions, part=(1, 2) if guidance > 1 else (0, 1))
