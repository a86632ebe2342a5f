"""`attnproc compare`: the same picture by diffusers' processors and by ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnproc.app import files
from attnproc.app.checks import prepare
from attnproc.app.faults import Fault
from attnproc.app.options import Device, Guidance, Processor, Prompt, Seed, Size, Steps
from attnproc.app.painting import Clock, Request, Tick, load, paint, progress
from attnproc.app.terminal import say

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from PIL.Image import Image

__all__ = ["compare"]


def compare(
    prompt: Prompt,
    processor: Processor = None,
    seed: Seed = 0,
    steps: Steps = 20,
    guidance: Guidance = 3.0,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the sheet, a .png file.")
    ] = Path("compare.png"),
    size: Size = 320,
    device: Device = "cpu",
) -> None:
    """Make the same picture with diffusers' processors and with attnproc's.

    Writes both side by side with their difference, and prints the largest difference and both
    times.
    """
    known = prepare(prompt, [out], processor)
    theirs = None if processor is None else _theirs(processor)
    request = Request(known.text, seed, steps, guidance)
    with progress(steps) as stage:
        pipeline = load(device)
        from attnproc.app import fitting, pictures

        if processor is not None:
            kind = fitting.find(processor)
            fitting.fuse(pipeline.unet, kind.recipe)
        if theirs is not None:
            pipeline.unet.set_attn_processor(fitting.make(theirs, guidance=guidance))
        before, before_s = _timed(pipeline, request, stage("diffusers"))
        ran = fitting.install(pipeline.unet, processor, guidance=guidance)
        after, after_s = _timed(pipeline, request, stage("attnproc"))

    worst = pictures.difference(before, after)
    files.save(pictures.side_by_side(before, after, size, known.text), out)
    say(
        f"{out}: {request}; {ran}; maximum difference {worst}/255; "
        f"diffusers {before_s:.2f} s, attnproc {after_s:.2f} s"
    )


def _theirs(name: str) -> Callable[..., Any]:
    """The class of diffusers that a processor of ours is compared with.

    Raises:
        Fault: The processor can't run the model, or diffusers has none of that name.
    """
    from attnproc.app.fitting import find

    ours = find(name)
    from diffusers.models import attention_processor

    found = getattr(attention_processor, ours.__name__, None)
    if found is None:
        raise Fault(f"diffusers has no {ours.__name__} to compare with")
    return found


def _timed(pipeline: StableDiffusionPipeline, request: Request, tick: Tick) -> tuple[Image, float]:
    """The picture and the seconds it took, after one step that is not counted."""
    paint(pipeline, Request(request.prompt, steps=1, guidance=request.guidance), lambda: None)
    clock = Clock()
    picture = paint(pipeline, request, tick)[0]
    return picture, clock.seconds
