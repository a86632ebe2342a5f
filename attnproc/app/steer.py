"""What `generate` steers the attention by: word weights, regions, a reference picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnproc.app.faults import Fault
from attnproc.app.wording import Prompt, read

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    from attnproc.app.painting import Hook, Request
    from attnproc.places import Box
    from attnproc.schedules import Schedule

__all__ = ["Steering", "Steps", "span", "steer", "weights_of"]

_SOFT = 0.1
# How far the prompt is seen in the regions too: it lays out the picture, these fill in.
_BASE = 0.1


@dataclass(frozen=True)
class Steps:
    """During which fraction of the steps something holds."""

    begin: float = 0.0
    end: float = 1.0

    def on(self, unet: Any) -> Schedule | float:
        """As a strength for layers of a model."""
        from attnproc.on import on

        whole = (self.begin, self.end) == (0, 1)
        return 1.0 if whole else on(unet).schedule(1.0, self.begin, self.end)


@dataclass(frozen=True)
class Steering:
    """What steers one run.

    Attributes:
        weights: Factors of words by their token.
        regions: Prompts of parts of the picture, with these parts.
        reference: The picture that the others look at.
        steps: During which steps weights, regions and reference hold.
    """

    weights: tuple[tuple[int, float], ...] = ()
    regions: tuple[tuple[Prompt, Box], ...] = ()
    reference: Path | None = None
    steps: Steps = Steps()

    def __str__(self) -> str:
        named = [f"{len(self.weights)} word weights"] if self.weights else []
        named += [f"{prompt.text} in its region" for prompt, _ in self.regions]
        named += [f"reference {self.reference.name}"] if self.reference else []
        return ", ".join(named)

    def put_on(self, unet: Any, part: tuple[int, int]) -> None:
        """Puts the parts on a model's layers.

        Args:
            unet: The model.
            part: Which part of the batch sees the prompt, of how many.
        """
        from attnproc.on import on
        from attnproc.steering import Region

        layers, strength = on(unet), self.steps.on(unet)
        if self.weights:
            layers.with_word_weights(dict(self.weights), part=part, strength=strength)
        if self.regions:
            length = _length()
            spans = [(i * length, (i + 1) * length) for i in range(len(self.regions) + 1)]
            boxes = [None, *(box for _, box in self.regions)]
            parts = [Region(*at, box, _SOFT) for at, box in zip(spans, boxes, strict=True)]
            layers.with_regions(*parts, strength=strength, base=_BASE)
        if self.reference:
            layers.with_reference(mode="replace", parts=part[1], strength=strength)

    def call(self, pipeline: StableDiffusionPipeline, request: Request) -> dict[str, Any]:
        """What of the pipeline's call is other than without."""
        prompts = [request.prompt, *(prompt.text for prompt, _ in self.regions)]
        rows = [prompts] * request.batch
        if self.reference:
            rows = [[""] * len(prompts), *rows]
        if not self.regions:
            return {"prompt": [row[0] for row in rows]}
        both = [_embedded(pipeline, row, request.guidance > 1) for row in rows]
        named = ("prompt_embeds", "negative_prompt_embeds")
        found = {
            name: _stacked(some) for name, some in zip(named, zip(*both, strict=True), strict=True)
        }
        return {"prompt": None, **found}

    def hooks(self, pipeline: StableDiffusionPipeline) -> list[Hook]:
        """What is to be done after each step."""
        from attnproc.on import on

        found: list[Hook] = [on(pipeline.unet).clock.on_step_end]
        if self.reference:
            from attnproc.app.reference import Noised

            found.append(Noised.read(self.reference, pipeline))
        return found


def steer(
    weights: Sequence[tuple[int, float]],
    regions: Sequence[str],
    reference: Path | None,
    steps: Steps,
) -> Steering:
    """Reads the options.

    Args:
        weights: Factors of words by their token.
        regions: Each as ``WORDS:LEFT,TOP,RIGHT,BOTTOM``.
        reference: A picture.
        steps: During which steps.

    Raises:
        Fault: One of them is none.
    """
    if reference is not None and not reference.is_file():
        raise Fault(f"--reference {reference}: there is no such file")
    return Steering(tuple(weights), tuple(_region(text) for text in regions), reference, steps)


def span(text: str | None) -> Steps:
    """The steps of ``BEGIN,END``.

    Raises:
        Fault: They are no fractions.
    """
    if text is None:
        return Steps()
    try:
        begin, end = (float(number) for number in text.split(","))
    except ValueError:
        raise Fault(f"--schedule {text}: give two fractions of the steps, such as 0,0.6") from None
    if not 0 <= begin < end <= 1:
        raise Fault(f"--schedule {text}: give fractions from 0 to 1, the first the smaller one")
    return Steps(begin, end)


def weights_of(prompt: str) -> tuple[str, tuple[tuple[int, float], ...]]:
    """A prompt without its weights such as ``(red:1.4)``, and the weights by token.

    Raises:
        Fault: A weight is no number.
    """
    from attnproc.app.demo import vocabulary
    from attnproc.steering import parse

    try:
        found = parse(prompt)
    except ValueError as error:
        raise Fault(str(error)) from error
    # As `wording.read` does, without the words that the model doesn't know.
    known = [word.known for word in vocabulary.words(found.text)]
    weights: list[tuple[int, float]] = []
    for start, stop, weight in found.spans:
        before = len(vocabulary.split(found.text[:start]))
        count = len(vocabulary.split(found.text[start:stop]))
        places = [i for i in range(before, before + count) if i < len(known) and known[i]]
        weights += [(1 + sum(known[:i]), weight) for i in places]
    return found.text, tuple(weights)


def _region(text: str) -> tuple[Prompt, Box]:
    from attnproc.places import Box

    words, _, numbers = text.rpartition(":")
    try:
        box = Box(*(float(number) for number in numbers.split(",")))
    except (TypeError, ValueError):
        raise Fault(
            f'--region {text}: give words and a box in fractions, such as "cat:0,0,0.5,1" for the '
            "left half"
        ) from None
    return read(words), box


def _length() -> int:
    from attnproc.app.demo.vocabulary import LENGTH

    return LENGTH


def _embedded(pipeline: Any, prompts: Sequence[str], guided: bool) -> tuple[Any, Any]:
    """The prompts one after another, and as many without words."""
    import torch

    with torch.inference_mode():
        pairs = [pipeline.encode_prompt(text, pipeline.device, 1, guided) for text in prompts]
    with_words, without = zip(*pairs, strict=True)
    return torch.cat(with_words, dim=1), torch.cat(without, dim=1) if guided else None


def _stacked(rows: Sequence[Any]) -> Any:
    import torch

    return None if rows[0] is None else torch.cat(list(rows))
