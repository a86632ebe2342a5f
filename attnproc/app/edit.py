"""`attnproc edit`: a picture, and the same with other words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnproc.app import files
from attnproc.app.checks import prepare
from attnproc.app.options import Device, Guidance, Prompt, Seed, Size, Steps
from attnproc.app.painting import Clock, Request, load, paint, progress
from attnproc.app.steer import weights_of
from attnproc.app.terminal import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

__all__ = ["edit"]


def edit(
    prompt: Prompt,
    other: Annotated[str, typer.Argument(help="The words of the edited picture.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the sheet, a .png file.")
    ] = Path("edit.png"),
    seed: Seed = 0,
    steps: Steps = 20,
    guidance: Guidance = 3.0,
    words: Annotated[
        float,
        typer.Option(min=0, max=1, help="Until which part of the steps words keep their places."),
    ] = 0.8,
    shapes: Annotated[
        float,
        typer.Option(min=0, max=1, help="Until which part of the steps shapes are kept."),
    ] = 0.4,
    size: Size = 320,
    device: Device = "cpu",
) -> None:
    """Make a picture, and the same with other words (prompt-to-prompt).

    Words that both prompts have keep their places, new ones take those of the words they stand
    for; they may have weights, as in "(red:1.4) heart". Writes the first picture, the edited
    one, and for comparison what the other words give by themselves.
    """
    clock = Clock()
    (first, _), (second, weights) = weights_of(prompt), weights_of(other)
    known = [prepare(text, [out], None).text for text in (first, second)]
    request = Request(known[0], seed, steps, guidance, batch=2)
    with progress(steps) as stage:
        pipeline = load(device)
        from attnproc.app import fitting

        fitting.install(pipeline.unet, None, guidance=guidance)
        part = (1, 2) if guidance > 1 else (0, 1)
        plain = _pair(pipeline, known, request, stage("painting"))
        _steer(pipeline.unet, known, weights, part, (words, shapes))
        edited = _pair(pipeline, known, request, stage("editing"))

    labels = (known[0], f"{known[1]}, edited", f"{known[1]}, by itself")
    files.save(_sheet((plain[0], edited[1], plain[1]), labels, size), out)
    say(f"{out}: {request}; {known[0]!r} to {known[1]!r}; {clock.seconds:.1f} s")


def _steer(
    unet: Any,
    prompts: Sequence[str],
    weights: Sequence[tuple[int, float]],
    part: tuple[int, int],
    ends: tuple[float, float],
) -> None:
    """Puts the first picture's maps on the layers, and the second one's word weights."""
    from attnproc.app.demo.vocabulary import LENGTH, split
    from attnproc.on import on
    from attnproc.steering import align

    layers = on(unet)
    alignment = align(split(prompts[0]), split(prompts[1]), length=LENGTH)
    words, shapes = (layers.schedule(1.0 if end else 0.0, 0.0, end) for end in ends)
    layers.with_prompt_to_prompt(alignment, strength=words, self_strength=shapes, part=part)
    if weights:
        # The second row of the part alone: every row is a part of its own.
        layers.with_word_weights(dict(weights), part=(2 * part[1] - 1, 2 * part[1]))


def _pair(pipeline: Any, prompts: list[str], request: Request, tick: Any) -> list[Image]:
    """The pictures of both prompts from the same noise."""
    import torch

    from attnproc.on import on

    on(pipeline.unet).clock.set(0.0)
    size = pipeline.unet.config.sample_size
    shape = (1, pipeline.unet.config.in_channels, size, size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
    latents = noise.to(pipeline.device, pipeline.unet.dtype).repeat(2, 1, 1, 1)
    hooks = [on(pipeline.unet).clock.on_step_end]
    return paint(pipeline, request, tick, {"prompt": prompts, "latents": latents}, hooks)


def _sheet(pictures: Sequence[Image], labels: Sequence[str], size: int) -> Image:
    from attnproc.app.pictures import enlarge
    from attnproc.plots import drawn, tiles

    figure, axes = tiles(len(pictures), 1, size / 100, "")
    for ax, picture, label in zip(axes[0], pictures, labels, strict=True):
        ax.imshow(enlarge(picture, size), interpolation="nearest")
        ax.set_title(label, fontsize=10)
    return drawn(figure)
