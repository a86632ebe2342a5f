"""The pictures that the metric compares with: all training pictures small, the asked ones whole.

Made by `python -m attnproc.app.demo.reference --data DIR`, shipped, and read offline.
"""

# The libraries used here are typed in part only.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from attnproc.app.demo import data
from attnproc.app.demo.vocabulary import split

__all__ = ["FOLDER", "Reference", "load"]

FOLDER = Path(__file__).parent / "reference"
ASKED = 56
COLUMNS = 41
# Skin tones weigh less than this, so they stay out: near copies of pictures that are in.
LEAST_WEIGHT = 0.3


@dataclass(frozen=True)
class Reference:
    """Pictures on white, as RGB bytes.

    Attributes:
        labels: A name for each picture.
        small: All of them, [N, 32, 32, 3].
        asked: Rows of those that the metric asks for.
        whole: These at full size, [56, 64, 64, 3].
    """

    labels: list[str]
    small: NDArray[np.uint8]
    asked: list[int]
    whole: NDArray[np.uint8]

    def row(self, label: str) -> int:
        """The row of the picture with this name."""
        return self.labels.index(label)


def load(folder: Path = FOLDER) -> Reference:
    """Reads the reference pictures.

    Args:
        folder: Where they are; the shipped ones if not given.
    """
    words = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    labels, asked = words["labels"], words["asked"]
    small = _cut(folder / "small.webp", 32, len(labels))
    return Reference(labels, small, asked, _cut(folder / "asked.webp", 64, len(asked)))


def _cut(file: Path, side: int, count: int) -> NDArray[np.uint8]:
    sheet = np.asarray(Image.open(file).convert("RGB"))
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    tiles = sheet.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, side, side, 3)[:count]


def _paste(pictures: list[Image.Image], file: Path) -> None:
    side = pictures[0].width
    columns = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * side, place // columns * side))
    sheet.save(file, lossless=True, quality=100, method=6)


def _on_white(picture: NDArray[np.uint8]) -> Image.Image:
    rgb = picture[:3].astype(int) + 255 - picture[3:]
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _unmistakable(labels: list[str]) -> list[int]:
    """Rows whose words name one picture alone; "keycap: *" and "keycap: #" read the same."""
    texts = [" ".join(split(label)) for label in labels]
    times = Counter(texts)
    return [row for row, text in enumerate(texts) if times[text] == 1]


def main(
    data_folder: Annotated[Path, typer.Option("--data", help="The training set's folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the reference.")] = FOLDER,
) -> None:
    """Writes the reference pictures of a training set."""
    pictures, entries = data.load(data_folder)
    rows = [row for row, entry in enumerate(entries) if entry.weight >= LEAST_WEIGHT]
    whole = [_on_white(pictures[row]) for row in rows]
    labels = [entries[row].labels[0] for row in rows]
    asked = sorted(random.Random(0).sample(_unmistakable(labels), ASKED))

    out.mkdir(parents=True, exist_ok=True)
    # Halves, by the same mean of 2 x 2 that training uses for the members of a pair.
    _paste([picture.reduce(2) for picture in whole], out / "small.webp")
    _paste([whole[row] for row in asked], out / "asked.webp")
    text = json.dumps({"asked": asked, "labels": labels}, ensure_ascii=False)
    (out / "labels.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
