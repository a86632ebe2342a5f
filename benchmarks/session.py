"""What the benchmark programs share: choosing by pattern, progress, a line a result."""

from __future__ import annotations

import fnmatch
import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import typer
from results import Results, commit_here
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sides import SIDES

__all__ = ["DTYPES", "chosen", "chosen_modes", "measured", "named", "opened"]

# It tells of image processors that nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Named(Protocol):
    """What can be chosen by a pattern."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...


Thing = TypeVar("Thing", bound=Named)


def chosen(things: Iterable[Thing], patterns: Sequence[str] | None) -> list[Thing]:
    """Those whose names match one of the patterns, or all."""
    things = list(things)
    found = [
        thing
        for thing in things
        if not patterns or any(fnmatch.fnmatchcase(thing.name, p) for p in patterns)
    ]
    if not found:
        names = ", ".join(thing.name for thing in things)
        raise typer.BadParameter(f"only: {patterns} matches none of {names}")
    return found


def chosen_modes(text: str, known: Mapping[str, Any]) -> tuple[str, ...]:
    """The modes in a list by commas, in the order in which they are to run."""
    asked = [named("modes", mode.strip(), {m: m for m in known}) for mode in text.split(",")]
    return tuple(mode for mode in known if mode in asked)


def named(option: str, name: str, known: Mapping[str, Any]) -> Any:
    """What an option names."""
    if name not in known:
        raise typer.BadParameter(f"{option} is {name!r}: choose of {', '.join(known)}")
    return known[name]


def opened(path: Path, device: str, commit: str | None, merge: bool, **settings: Any) -> Results:
    """The results file; the commit is git's where none is given."""
    try:
        return Results(path, device, commit or commit_here(), merge=merge, **settings)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem


def measured(
    things: Sequence[Thing],
    measure: Callable[[Thing], dict[str, Any]],
    results: Results,
    limit: float,
    passes: int = 1,
) -> None:
    """Measures one after the other into the file.

    Args:
        things: Rows or models.
        measure: Gives the results of one; what failed is among them.
        results: The file.
        limit: Seconds after which none is begun.
        passes: How often; of each mode the quietest counts.

    Raises:
        typer.Exit: Something failed.
    """
    end = time.perf_counter() + limit
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    failed = False
    # What is imported is not looked through at every collection.
    gc.freeze()
    with bar:
        task = bar.add_task("", total=passes * len(things))
        for number, thing in enumerate(passes * list(things)):
            if time.perf_counter() > end:
                console.print(f"limit: {limit:g} s are over, left out from {thing.name} on")
                break
            bar.update(task, description=thing.name)
            found = measure(thing)
            failed = failed or "failed" in found
            first = number < len(things)
            results.add(thing.name, found if first else results.quieter(thing.name, found))
            console.print(line(thing.name, found), highlight=False, soft_wrap=True)
            bar.advance(task)
    if failed:
        raise typer.Exit(1)


def line(name: str, found: dict[str, Any]) -> str:
    """A row's figures as ours / diffusers', in ms."""
    if "failed" in found:
        return f"{name:26} failed: {found['failed']}"
    parts = [f"{name:26}"]
    for key in found.get("ours", {}):
        if key.endswith(("_ms", "peak_mib")) and "_min_" not in key:
            pair = (f"{found.get(side, {}).get(key, float('nan')):.3f}" for side in SIDES)
            parts.append(f"{key.removesuffix('_ms')} {'/'.join(pair)}")
    if "ms" in found.get("floor", {}):
        parts.append(f"floor {found['floor']['ms']:.3f}")
    if "graphs" in found.get("ours", {}):
        parts.append(f"breaks {found['ours']['breaks']}")
    return "  ".join(parts + [f"{k}: {v}" for k, v in found.get("failures", {}).items()])
