"""`attnproc list`: the processors with their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from attnproc.app.faults import Fault

if TYPE_CHECKING:
    from attnproc.types import Recipe

__all__ = ["list_processors"]


def list_processors(
    name: Annotated[
        str, typer.Argument(help="Only processors whose name has this in it.", show_default=False)
    ] = "",
    full: Annotated[
        bool, typer.Option("--full", help="Every part of each, line by line.")
    ] = False,
) -> None:
    """Show the processors with their parts.

    Parts are given where they differ from those of AttnProcessor2_0, which is the first row.
    """
    from rich.console import Console
    from rich.table import Table

    from attnproc import presets

    first = "AttnProcessor2_0"
    found = [known for known in presets.__all__ if name.lower() in known.lower()]
    if not found:
        raise Fault(f"there is no processor with {name!r} in its name, see `attnproc list`")
    recipes: dict[str, Recipe] = {known: getattr(presets, known).recipe for known in found}
    base = _parts(getattr(presets, first).recipe)

    table = Table("processor", "parts", title=_title(len(found)), title_justify="left")
    for known in sorted(recipes, key=lambda known: (known != first, found.index(known))):
        every = full or known == first
        own = _parts(recipes[known])
        pairs = [pair for pair in own if pair[1] != "-"] if every else _changed(own, base)
        table.add_row(known, _spelled(pairs, "\n" if full else ", "))
    console = Console()
    console.print(table)


def _title(count: int) -> str:
    return f"{count} processors" if count > 1 else "1 processor"


def _changed(own: list[tuple[str, str]], base: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair, plain in zip(own, base, strict=True) if pair != plain]


def _parts(recipe: Recipe) -> list[tuple[str, str]]:
    """The parts in words; a frame that has a name of its own by that name."""
    from attnproc import frame
    from attnproc.describe import parts

    values = {name: getattr(frame, name) for name in frame.__all__}
    named = [name for name, value in values.items() if value == recipe.frame]
    (field, steps), *others = parts(recipe)
    return [(field, named[0] if named else steps), *others]


def _spelled(pairs: list[tuple[str, str]], between: str) -> str:
    from rich.markup import escape

    shown = (f"[dim]{field}[/dim] {escape(part)}" for field, part in pairs)
    return between.join(shown) or "the same parts"
