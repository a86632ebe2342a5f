"""Measures the demo model: `python -m attnproc.app.demo.metric`.

Asks for pictures by name and looks for the nearest training picture. That measures recall, so
three controls show what the figures are when the words or the attention don't work.
"""

# The libraries used here are typed in part only.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from attnproc.app.demo import prompts, reference
from attnproc.app.demo.model import load
from attnproc.app.demo.palette import NOVEL_PAIRS
from attnproc.app.demo.reference import Reference

__all__ = ["Halves", "Score", "Uniform", "generate", "measure", "measure_pairs", "nearest"]

STEPS = 20
GUIDANCE = 3.0
BATCH = 4
RESULT = Path("benchmarks/results/demo-metric.json")


@dataclass(frozen=True)
class Score:
    """How near pictures came to what was asked.

    Attributes:
        right: Pictures whose nearest training picture is the one asked for.
        count: Pictures made.
        low: PSNR to the one asked for in dB, 10th percentile.
        median: The same, median.
        high: The same, 90th percentile.
    """

    right: int
    count: int
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Halves:
    """How many pairs show what was asked.

    Attributes:
        both: Pairs whose two halves are right.
        left: Pairs whose left half is right.
        right: Pairs whose right half is right.
        count: Pairs made.
    """

    both: int
    left: int
    right: int
    count: int


class Uniform:
    """A broken attention processor for the control: each query gets the mean of all values."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        value = attn.to_v(context).mean(1, keepdim=True).expand(-1, hidden_states.shape[1], -1)
        projection: nn.Module = attn.to_out[0]
        return projection(value)


def generate(
    pipeline: Any,
    asked: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    note: str = "",
) -> NDArray[np.uint8]:
    """Makes one picture a prompt; prompt `n` has seed `n`.

    Args:
        pipeline: The demo model, as `load` returns it.
        asked: The prompts.
        steps: Steps a picture.
        guidance: Guidance scale.
        note: Name of the progress bar, which is not shown if this is empty.

    Returns:
        RGB bytes, [N, 64, 64, 3].
    """
    pipeline.set_progress_bar_config(disable=True)
    made: list[Any] = []
    for start in track(range(0, len(asked), BATCH), description=note, disable=not note):
        some = list(asked[start : start + BATCH])
        seeds = [torch.Generator().manual_seed(start + n) for n in range(len(some))]
        made += pipeline(
            some, num_inference_steps=steps, guidance_scale=guidance, generator=seeds
        ).images
    return np.stack([np.asarray(picture) for picture in made])


def nearest(pictures: NDArray[np.uint8], known: NDArray[np.uint8]) -> list[int]:
    """For each picture the row of the nearest known one, by L2.

    Args:
        pictures: RGB bytes, [N, 32, 32, 3].
        known: RGB bytes, [M, 32, 32, 3].
    """
    one = torch.from_numpy(pictures).flatten(1).float()
    two = torch.from_numpy(known).flatten(1).float()
    return torch.cdist(one, two).argmin(1).tolist()


def measure(pictures: NDArray[np.uint8], rows: Sequence[int], known: Reference) -> Score:
    """Scores pictures of single things.

    Args:
        pictures: RGB bytes, [N, 64, 64, 3].
        rows: For each the place in `known.asked` of what was asked.
        known: The reference pictures.
    """
    found = nearest(np.stack([_halve(picture) for picture in pictures]), known.small)
    right = sum(row == known.asked[place] for row, place in zip(found, rows, strict=True))
    error = (pictures.astype(np.float64) - known.whole[list(rows)]) ** 2
    decibels = 10 * np.log10(255**2 / error.mean((1, 2, 3)).clip(1e-9))
    low, median, high = np.percentile(decibels, (10, 50, 90)).round(2).tolist()
    return Score(right, len(pictures), low, median, high)


def measure_pairs(
    pictures: NDArray[np.uint8], pairs: Sequence[tuple[str, str]], known: Reference
) -> Halves:
    """Scores pictures of two things side by side, each half by itself.

    Args:
        pictures: RGB bytes, [N, 64, 64, 3].
        pairs: For each the names of the left and the right thing.
        known: The reference pictures.
    """
    left = nearest(np.ascontiguousarray(pictures[:, 16:48, :32]), known.small)
    right = nearest(np.ascontiguousarray(pictures[:, 16:48, 32:]), known.small)
    hits = [
        (one == known.row(pair[0]), two == known.row(pair[1]))
        for one, two, pair in zip(left, right, pairs, strict=True)
    ]
    lefts, rights = (sum(side) for side in zip(*hits, strict=True))
    return Halves(sum(one and two for one, two in hits), lefts, rights, len(hits))


def _halve(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).reduce(2))


def _singles(pipeline: Any, known: Reference, steps: int) -> dict[str, Score]:
    """The figure itself and its controls."""
    places = list(range(len(known.asked)))
    asked = [known.labels[row] for row in known.asked]
    pictures = generate(pipeline, asked, steps=steps, note="singles")
    scores = {
        "asked": measure(pictures, places, known),
        "shuffled captions": measure(pictures, places[1:] + places[:1], known),
    }
    pictures = generate(pipeline, asked, steps=steps, guidance=1.0, note="no guidance")
    scores["no guidance"] = measure(pictures, places, known)

    kept = pipeline.unet.attn_processors
    pipeline.unet.set_attn_processor(Uniform())
    pictures = generate(pipeline, asked, steps=steps, note="uniform attention")
    pipeline.unet.set_attn_processor(kept)
    scores["uniform attention"] = measure(pictures, places, known)
    return scores


def _pairs(pipeline: Any, known: Reference, steps: int) -> dict[str, Halves]:
    """Held-out pairs, and pairs of things drawn at random from those asked for as singles."""
    short = [known.labels[row] for row in known.asked if known.labels[row].count(" ") < 2]
    drawn = list(zip(short[::2], short[1::2], strict=False))[: len(NOVEL_PAIRS)]
    scores: dict[str, Halves] = {}
    for name, pairs in (("held out", list(NOVEL_PAIRS)), ("random", drawn)):
        asked = [f"{one} and {two}" for one, two in pairs]
        pictures = generate(pipeline, asked, steps=steps, note=f"pairs, {name}")
        scores[name] = measure_pairs(pictures, pairs, known)
    return scores


def _table(singles: dict[str, Score], pairs: dict[str, Halves]) -> Table:
    table = Table("what", "right", "PSNR dB: p10", "median", "p90")
    for name, score in singles.items():
        figures = (score.low, score.median, score.high)
        right = f"{score.right} of {score.count}"
        table.add_row(name, right, *(f"{value:.1f}" for value in figures))
    for name, halves in pairs.items():
        right = f"{halves.both} of {halves.count}"
        table.add_row(f"pairs, {name}", right, f"left {halves.left}", f"right {halves.right}")
    return table


def _circumstances(seconds: float, steps: int) -> dict[str, Any]:
    packages = ("torch", "diffusers", "transformers", "safetensors", "pillow")
    return {
        "command": shlex.join(["python", "-m", "attnproc.app.demo.metric", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(seconds),
        "steps": steps,
        "guidance": GUIDANCE,
    }


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the figures.")] = RESULT,
    steps: Annotated[int, typer.Option(help="Steps a picture.")] = STEPS,
    sheet: Annotated[
        Path | None, typer.Option(help="Only draw the twenty fixed prompts, into this PNG.")
    ] = None,
) -> None:
    """Measures the demo model and writes the figures."""
    pipeline = load()
    if sheet is not None:
        pictures = generate(pipeline, prompts.PROMPTS, steps=steps, note="sheet")
        prompts.sheet([Image.fromarray(picture) for picture in pictures], sheet)
        return

    begun, known = time.monotonic(), reference.load()
    singles = _singles(pipeline, known, steps)
    pairs = _pairs(pipeline, known, steps)
    Console().print(_table(singles, pairs))

    figures = {
        **_circumstances(time.monotonic() - begun, steps),
        "singles": {name: asdict(score) for name, score in singles.items()},
        "pairs": {name: asdict(halves) for name, halves in pairs.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
