"""`attnproc generate`: words to a picture, and where each word looked."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnproc.app import adapters, files, ranks
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
    Reference,
    Region,
    Schedule,
    Seed,
    Size,
    Steps,
)
from attnproc.app.painting import Clock, Request, load, paint, progress
from attnproc.app.steer import span, steer, weights_of
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
    maps_html: Annotated[
        bool, typer.Option("--maps-html", help="Also write OUT-maps.html, to point at words in.")
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
    region: Region = None,
    reference: Reference = None,
    schedule: Schedule = None,
    size: Size = 512,
    device: Device = "cpu",
) -> None:
    """Make a picture from words.

    It is drawn by the small model that ships with attnproc, which knows things, tints and
    coloured backgrounds: "red octopus on a yellow background". Its attention runs on attnproc.
    Words may have weights, as in "(red:1.4) heart". What goes on it, such as --lora and
    --image, may be combined.
    """
    clock = Clock()
    targets, sheet = files.numbered(out, batch), out.with_stem(f"{out.stem}-maps")
    plain, weights = weights_of(prompt)
    known = prepare(plain, [*targets, *([sheet] if maps or maps_html else [])], processor)
    given = adapters.read(lora or (), custom, image, pag)
    steering = steer(weights, region or (), reference, span(schedule))
    request, part = Request(known.text, seed, steps, guidance, batch), _words_rows(guidance, pag)
    with ranks.joined(device), progress(steps) as stage:
        pipeline = load(device)
        from attnproc.app import fitting, pictures

        ran = fitting.install(pipeline.unet, processor, guidance=guidance)
        pipeline = given.put_on(pipeline)
        steering.put_on(pipeline.unet, part)
        ran += ranks.spread(pipeline.unet, part[1] * batch)
        ready, hooks = clock.seconds, steering.hooks(pipeline)
        inputs = {**given.inputs(guidance), **steering.call(pipeline, request)}
        positions = known.positions if maps or maps_html else None
        with _captured(pipeline.unet, positions, part, maps_html) as seen:
            painted = paint(pipeline, request, stage("painting"), inputs, hooks)

    if not ranks.first():
        return
    first = len(painted) - batch
    for picture, path in zip(painted[first:], targets, strict=True):
        files.save(pictures.enlarge(picture, size), path)
    written = [files.shown(targets)]
    if seen is not None and maps:
        files.save(pictures.sheet(painted, seen, known.text), sheet)
        written.append(str(sheet))
    if seen is not None and maps_html:
        from attnproc.html import save

        save(sheet.with_suffix(".html"), painted[first], seen, known.text, row=first)
        written.append(str(sheet.with_suffix(".html")))
    with_ = ", ".join(filter(None, (str(given), str(steering))))
    say(
        f"{' and '.join(written)}: {request}; {ran}{' with ' if with_ else ''}{with_}; "
        f"{clock.seconds:.1f} s, {ready:.1f} s of them to load"
    )


def _words_rows(guidance: float, pag: float) -> tuple[int, int]:
    """Which part of the batch sees the prompt undisturbed, of how many."""
    before, after = int(guidance > 1), int(pag > 0)
    return before, before + 1 + after


def _captured(
    unet: UNet2DConditionModel,
    positions: Mapping[str, int] | None,
    part: tuple[int, int],
    each_step: bool,
) -> AbstractContextManager[Maps | None]:
    """Capture of the words' maps in cross attention, of the rows that see the prompt."""
    if positions is None:
        return nullcontext()
    from attnproc.capture import capture

    return capture(unet, positions, part=part, each_step=each_step)
