"""Writes docs/presets.md, the table of class by part, from the recipes themselves.

Run `python docs/make_presets.py`; `--check` fails where the page is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import attnproc
from attnproc.describe import parts
from attnproc.presets import adapters, dit, joint, unet

PAGE = Path(__file__).parent / "presets.md"
BASE = dict(parts(attnproc.AttnProcessor2_0.recipe))


def page() -> str:
    """The page: one section a module of presets, one row a class."""
    lines = [
        "# The 52 processors, class by part",
        "",
        "Made by `docs/make_presets.py` from the recipes. A part that is not named is that of",
        "`AttnProcessor2_0`:",
        "",
        "| part | of `AttnProcessor2_0` |",
        "|---|---|",
        *(f"| {name} | {part} |" for name, part in BASE.items()),
    ]
    for module in (unet, adapters, joint, dit):
        lines += [
            "",
            f"## {module.__name__.rpartition('.')[2]}",
            "",
            (module.__doc__ or "").strip(),
        ]
        lines += ["", "| class | parts that differ | what it is |", "|---|---|---|"]
        lines += [_row(name) for name in module.__all__]
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    kind = getattr(attnproc, name)
    own = [f"{part} {what}" for part, what in parts(kind.recipe) if BASE[part] != what]
    first = (kind.__doc__ or "").strip().splitlines()[0]
    return f"| `{name}` | {'; '.join(own) or 'none'} | {first} |"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(f"{PAGE.name} is out of date" if PAGE.read_text() != page() else 0)
    PAGE.write_text(page())
