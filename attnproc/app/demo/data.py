"""Makes the training set: Noto pictures from SVG, captions from emojibase.

Run `python -m attnproc.app.demo.data --out DIR --fetch`.
"""

# The libraries used here are typed in part only.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import io
import json
import random
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from attnproc.app.demo.palette import GROUNDS, TINTS
from attnproc.app.demo.vocabulary import split

__all__ = ["PACKAGES", "SIZE", "Entry", "captions", "load", "vocabulary"]

SIZE = 64
MARGIN = 0.06
PACKAGES = {"pictures": "@iconify-json/noto@1.2.9", "labels": "emojibase-data@17.0.0"}

# Country flags come from another source than Noto's own drawings, under other terms.
LEFT_OUT = {"country-flag", "subdivision-flag", "skin-tone", "hair-style"}
GROUP_WEIGHT = {"people-body": 0.5, "symbols": 0.6}
TONE_WEIGHT = 0.05
PAIR_WORDS = 5
COLOUR_WORDS = {*GROUNDS, *TINTS, "golden"}
FUNCTION_WORDS = ["a", "an", "and", "on", "background", "the", "with", "of"]


@dataclass(frozen=True)
class Entry:
    """One picture's words and how often it is drawn.

    Attributes:
        labels: Its names; the first is the one asked for in tests.
        tags: Loosely related words.
        weight: Share among single pictures.
        pair_weight: Share among the halves of pairs.
        tintable: False when a label already names a colour.
    """

    labels: list[str]
    tags: list[str]
    weight: float
    pair_weight: float
    tintable: bool


def vocabulary(entries: list[Entry]) -> list[str]:
    """Every word of a label, the words that tag two pictures or more, and those that join them."""
    found = {*COLOUR_WORDS, *FUNCTION_WORDS}
    tagged: Counter[str] = Counter()
    for entry in entries:
        found.update(split(" ".join(entry.labels)))
        if entry.weight >= min(GROUP_WEIGHT.values()):
            tagged.update(set(split(" ".join(entry.tags))))
    return sorted(found | {word for word, times in tagged.items() if times > 1})


def captions(entry: Entry, count: int, rng: random.Random) -> list[list[str]]:
    """Draws captions of one picture.

    Args:
        entry: The picture's words.
        count: How many captions.
        rng: Source of randomness.

    Returns:
        Word lists: mostly a label, at times with tags behind it, at times tags alone.
    """
    drawn: list[list[str]] = []
    for _ in range(count):
        text = [rng.choice(entry.labels)]
        chance = rng.random()
        if chance > 0.78 and entry.tags:
            tags = rng.sample(entry.tags, min(len(entry.tags), rng.randint(1, 2)))
            text = tags if chance > 0.9 else text + tags
        drawn.append(split(" ".join(text)))
    return drawn


def load(folder: Path) -> tuple[np.ndarray, list[Entry]]:
    """Reads a training set.

    Args:
        folder: Where `python -m attnproc.app.demo.data` has written.

    Returns:
        Premultiplied RGBA pictures [N, 4, 64, 64] as bytes, and their N entries.
    """
    with np.load(folder / "pictures.npz") as saved:
        pictures = saved["pictures"]
    raw = json.loads((folder / "entries.json").read_text(encoding="utf-8"))
    return pictures, [Entry(**entry) for entry in raw]


def _fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES.values():
        done = subprocess.run(
            ["npm", "pack", package, "--json", "--ignore-scripts"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        archive = folder / json.loads(done.stdout)[0]["filename"]
        with tarfile.open(archive) as packed:
            packed.extractall(folder / package.rpartition("@")[0], filter="data")


def _read(folder: Path, kind: str, name: str) -> Any:
    path = folder / PACKAGES[kind].rpartition("@")[0] / "package" / name
    if not path.is_file():
        raise typer.BadParameter(f"{path} is missing; get the packages with --fetch")
    return json.loads(path.read_text(encoding="utf-8"))


def _emoji(folder: Path) -> Iterator[tuple[str, Entry]]:
    """Code points and words of every emoji in use, skin tones after their base."""
    meta = _read(folder, "labels", "meta/groups.json")
    for item in _read(folder, "labels", "en/data.json"):
        if "group" not in item or meta["subgroups"][str(item["subgroup"])] in LEFT_OUT:
            continue
        label, tags = item["label"], item.get("tags", [])
        weight = GROUP_WEIGHT.get(meta["groups"][str(item["group"])], 1.0)
        plain = not COLOUR_WORDS.intersection(split(label))
        pair_weight = weight if len(split(label)) <= PAIR_WORDS else 0.0
        yield item["hexcode"], Entry([label], tags, weight, pair_weight, plain)

        for skin in item.get("skins", []):
            if isinstance(skin["tone"], int):
                yield skin["hexcode"], Entry([skin["label"]], tags, weight * TONE_WEIGHT, 0, plain)


def _render(body: str, width: int, height: int) -> Image.Image:
    """Draws an icon large, crops it to the ink, centres it and shrinks it to 64 x 64."""
    import resvg_py

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=384, height=384)
    large = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    ink = large.crop(large.getchannel("A").getbbox())
    side = round(max(ink.size) * (1 + 2 * MARGIN))

    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBa")


def _make(folder: Path) -> tuple[np.ndarray, list[Entry]]:
    icons = _read(folder, "pictures", "icons.json")
    names = _read(folder, "pictures", "chars.json")
    pictures: list[np.ndarray] = []
    entries: list[Entry] = []
    seen: dict[bytes, int] = {}

    for code, entry in track(list(_emoji(folder)), description="drawing"):
        key = code.lower().replace("-fe0f", "")
        name = names.get(key) or names.get(code.lower())
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        picture = np.asarray(
            _render(icon["body"], icon.get("width", 128), icon.get("height", 128))
        )
        first = seen.setdefault(picture.tobytes(), len(entries))
        if first < len(entries):
            entries[first].labels.extend(entry.labels)
            continue
        pictures.append(picture.transpose(2, 0, 1))
        entries.append(entry)
    return np.stack(pictures), entries


def main(
    out: Annotated[Path, typer.Option(help="Folder for the training set.")],
    packages: Annotated[
        Path | None, typer.Option(help="Folder of the npm packages; OUT/packages if not given.")
    ] = None,
    fetch: Annotated[bool, typer.Option(help="Get the packages with npm first.")] = False,
) -> None:
    """Draws the training pictures and writes them with their captions."""
    folder = packages or out / "packages"
    if fetch:
        _fetch(folder)
    pictures, entries = _make(folder)

    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "pictures.npz", pictures=pictures)
    words = json.dumps([asdict(entry) for entry in entries], indent=0, ensure_ascii=False)
    (out / "entries.json").write_text(words, encoding="utf-8")
    print(f"{len(entries)} pictures, {len(vocabulary(entries))} words: {out}")


if __name__ == "__main__":
    typer.run(main)
