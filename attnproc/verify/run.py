"""`attnproc verify`: every class in every configuration, as a table and an exit status."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from attnproc.verify import fakes
from attnproc.verify.build import diffusers_found
from attnproc.verify.cases import Case, select
from attnproc.verify.check import Outcome, check, graph_breaks, quiet
from attnproc.verify.golden import load_golden

__all__ = ["app", "run", "verify"]

app = typer.Typer(add_completion=False, help="Compare every processor with its reference.")


@app.command()
def verify(
    only: Annotated[
        str | None, typer.Option(help="Part of a case's id, or a pattern such as 'Flux*rope*'.")
    ] = None,
    golden: Annotated[
        bool | None,
        typer.Option(
            "--golden/--diffusers",
            help="Compare with stored results, on our own modules, or with diffusers.",
        ),
    ] = None,
    compile: Annotated[bool, typer.Option(help="Count graph breaks, two cases a class.")] = True,
    low: Annotated[bool, typer.Option(help="Check bf16 and fp16 as well.")] = True,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the outcome of every case here.")
    ] = None,
) -> None:
    """Run every class in every configuration; fail if any differs from its reference."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    stored = load_golden() if (not diffusers_found() if golden is None else golden) else None
    cases = select(only)
    if not cases:
        console.print(f"only: no case matches {only!r}")
        raise typer.Exit(2)
    # The tensors are tiny: on a busy machine more threads only wait for each other.
    torch.set_num_threads(1)
    start = time.perf_counter()
    outcomes = run(cases, stored, low=low, compiled=compile, console=console)
    failed = [outcome for outcome in outcomes if outcome.failures]
    console.print(_table(outcomes))
    for outcome in failed:
        console.print(f"{outcome.case.id}: {outcome.failures[0]}", style="red", markup=False)
    console.print(_summary(outcomes, failed, stored is not None, time.perf_counter() - start))
    if as_json is not None:
        as_json.write_text(json.dumps([_record(outcome) for outcome in outcomes], indent=1))
    if failed:
        raise typer.Exit(1)


def run(
    cases: Iterable[Case],
    golden: Mapping[str, Tensor] | None = None,
    *,
    low: bool = True,
    compiled: bool = True,
    console: Console | None = None,
) -> list[Outcome]:
    """Check the cases one after the other.

    Args:
        cases: what to check.
        golden: stored results, to be used in place of diffusers.
        low: whether bf16 and fp16 are checked as well.
        compiled: whether graph breaks are counted, in two cases a class.
        console: where the progress bar goes.

    Returns:
        An outcome a case, in order.
    """
    cases = list(cases)
    traced = _representatives(cases) if compiled else set[str]()
    bar = Progress(
        TextColumn("{task.description:42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    outcomes: list[Outcome] = []
    with bar, fakes.installed(), quiet():
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=case.cls)
            outcome = check(case, golden, low)
            if case.id in traced and not outcome.failures:
                _trace(outcome, golden is not None)
            outcomes.append(outcome)
            bar.advance(task)
    return outcomes


def _representatives(cases: list[Case]) -> set[str]:
    """The plainest and the richest case of each class."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.cls].append(case)
    chosen = [(group[0], max(group, key=lambda case: len(case.tags))) for group in groups.values()]
    return {case.id for pair in chosen for case in pair}


def _trace(outcome: Outcome, own: bool) -> None:
    try:
        outcome.breaks = graph_breaks(outcome.case, own)
    except Exception as error:
        outcome.failures.append(f"compiled: {type(error).__name__}: {error}".splitlines()[0])
        return
    if outcome.breaks:
        outcome.failures.append(f"graph breaks: {outcome.breaks}")


def _table(outcomes: list[Outcome]) -> Table:
    table = Table("class", title_justify="left", header_style="bold")
    for heading in ("configurations", "failed", "worst error", "graph breaks"):
        table.add_column(heading, justify="right")
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.case.cls].append(outcome)
    for cls, group in groups.items():
        failed = sum(bool(outcome.failures) for outcome in group)
        counted = [outcome.breaks for outcome in group if outcome.breaks is not None]
        table.add_row(
            cls,
            str(len(group)),
            str(failed) if failed else "",
            f"{max(outcome.error for outcome in group):.1e}",
            str(sum(counted)) if counted else "",
            style="red" if failed else None,
        )
    return table


def _summary(outcomes: list[Outcome], failed: list[Outcome], stored: bool, took: float) -> str:
    classes = len({outcome.case.cls for outcome in outcomes})
    naive = sum(outcome.case.compare == "naive" for outcome in outcomes)
    against = "stored results" if stored else "diffusers"
    return (
        f"{len(outcomes)} configurations of {classes} classes: {len(outcomes) - naive} against "
        f"{against}, {naive} against the naive oracle; {len(failed)} failed; "
        f"{took:.0f} s, torch {torch.__version__}"
    )


def _record(outcome: Outcome) -> dict[str, object]:
    return {
        "case": outcome.case.id,
        "class": outcome.case.cls,
        "compare": outcome.case.compare,
        "error": outcome.error,
        "graph_breaks": outcome.breaks,
        "failures": outcome.failures,
    }
