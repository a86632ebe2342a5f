"""`attnproc generate`: words to a picture, and where each word looked."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnproc.app import adapters, files
from attnproc.app.checks import prepare
from attnproc.app.options import (
    Batch,
    Custom,
    Device,
    Guidance,
    Image,
    Lora,
    Pag,
    Processor,
    Prompt,
    Seed,
    Size,
    Steps,
)
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
    lora: Lora = None,
    custom: Custom = None,
    image: Image = None,
    pag: Pag = 0.0,
    size: Size = 512,
    device: Device = "cpu",
) -> None:
    """Make a picture from words.

    It is drawn by the small model that ships with attnproc, which knows things, tints and
    coloured backgrounds: "red octopus on a yellow background". Its attention runs on attnproc.
    What goes on it, such as --lora and --image, may be combined.
    """
    clock = Clock()
    targets, sheet = files.numbered(out, batch), out.with_stem(f"{out.stem}-maps")
    known = prepare(prompt, [*targets, *([sheet] if maps else [])], processor)
    given = adapters.read(lora or (), custom, image, pag)
    request = Request(known.text, seed, steps, guidance, batch)
    with progress(steps) as stage:
        pipeline = load(device)
        from attnproc.app import fitting, pictures

        ran = fitting.install(pipeline.unet, processor, guidance=guidance)
        pipeline = given.put_on(pipeline)
        ready = clock.seconds
        positions = known.positions if maps else None
        with _captured(pipeline.unet, positions, _words_rows(guidance, pag)) as seen:
            painted = paint(pipeline, request, stage("painting"), given.inputs(guidance))

    for picture, path in zip(painted, targets, strict=True):
        files.save(pictures.enlarge(picture, size), path)
    if seen is not None:
        files.save(pictures.sheet(painted, seen, known.text), sheet)
    where = files.shown(targets) + (f" and {sheet}" if maps else "")
    with_ = f" with {given}" if str(given) else ""
    say(f"{where}: {request}; {ran}{with_}; {clock.seconds:.1f} s, {ready:.1f} s of them to load")


def _words_rows(guidance: float, pag: float) -> tuple[int, int]:
    """Which part of the batch sees the prompt undisturbed, of how many."""
    before, after = int(guidance > 1), int(pag > 0)
    return before, before + 1 + after


def _captured(
    unet: UNet2DConditionModel, positions: Mapping[str, int] | None, part: tuple[int, int]
) -> AbstractContextManager[Maps | None]:
    """Capture of the words' maps in cross attention, of the rows that see the prompt."""
    if positions is None:
        return nullcontext()
    from attnproc.capture import capture

    return capture(unet, positions, part=part)
