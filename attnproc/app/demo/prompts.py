"""Twenty fixed prompts and the sheet of their pictures."""

from pathlib import Path

from PIL import Image, ImageDraw

__all__ = ["PROMPTS", "sheet"]

PROMPTS = (
    "rocket",
    "octopus",
    "bicycle",
    "owl",
    "cactus",
    "castle",
    "blue apple",
    "purple elephant",
    "green fox",
    "pink guitar",
    "penguin on a yellow background",
    "hamburger on a blue background",
    "snowman on a black background",
    "red octopus on a yellow background",
    "blue rocket on an orange background",
    "green turtle on a pink background",
    "rocket and pizza",
    "cat and umbrella",
    "robot and rose",
    "snowman and bicycle",
)

SCALE = 3
COLUMNS = 5
CAPTION = 18


def sheet(pictures: list[Image.Image], path: Path) -> None:
    """Writes the pictures of `PROMPTS`, each with its prompt below.

    Args:
        pictures: One for each prompt, in order.
        path: The PNG to write.
    """
    side = pictures[0].width * SCALE
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (side + 8), rows * (side + CAPTION + 8)), "white")
    draw = ImageDraw.Draw(page)

    for place, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        left, top = place % COLUMNS * (side + 8), place // COLUMNS * (side + CAPTION + 8)
        page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left + 4, top))
        draw.text((left + 4 + side / 2, top + side + 2), prompt, fill="black", anchor="ma")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
