"""Lines for the user: results on standard output, everything else on standard error."""

from __future__ import annotations

from rich.console import Console

__all__ = ["fail", "note", "say"]


def say(line: str) -> None:
    """A result; unwrapped, so that paths can be copied."""
    Console(soft_wrap=True, highlight=False).print(line, markup=False)


def note(line: str) -> None:
    """Something the user should know."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"note: {line}", markup=False)


def fail(line: str) -> None:
    """Why nothing was done."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"attnproc: {line}", style="red", markup=False)
