"""Lines for the user: results on standard output, everything else on standard error.

Of several processes the first alone says anything but what went wrong, which is each one's own.
"""

from __future__ import annotations

from rich.console import Console

from attnproc.app.ranks import first, named

__all__ = ["fail", "note", "say"]


def say(line: str) -> None:
    """A result; unwrapped, so that paths can be copied."""
    Console(soft_wrap=True, highlight=False, quiet=not first()).print(line, markup=False)


def note(line: str) -> None:
    """Something the user should know."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=not first())
    console.print(f"note: {line}", markup=False)


def fail(line: str) -> None:
    """Why nothing was done."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"attnproc: {named(line)}", style="red", markup=False)
