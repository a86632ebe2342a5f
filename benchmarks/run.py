"""Times our processors beside diffusers' at the calls of real models, in one run.

    python benchmarks/run.py --device cuda
    python benchmarks/run.py --device cuda --modes compiled,backward --merge  # adds to that file
    python benchmarks/run.py --shrink 16 --only "sd15*" --only "flux*"  # on a CPU

A row first passes a gate: the outputs of both sides agree, and their gradients before a backward
pass is timed. Then the modes, the sides by turns:

    eager     wall time, amortised over many calls, and `host_ms`, the CPU's cost of a call
    graph     the call replayed as a CUDA graph: the GPU's own time
    compiled  under torch.compile, with the number of graphs and breaks
    backward  forward and backward pass: wall time and, on a GPU, as a graph
    peak      memory above what was held before: forward, and backward if that is asked too
    floor     the linear layers and the fastest attention kernel alone (benchmarks/floor.py)

Results go to `benchmarks/results/run-<device>-<dtype>.json` after each row.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import compiled as compiling
import floor as floors
import torch
import typer
from measure import by_turns, graphed, host, peak_mib
from results import RESULTS, Results, commit_here
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rows import ROWS, Row
from sides import SIDES, Pair, difference, pair

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What a run measures by."""

    device: str
    dtype: torch.dtype
    shrink: int
    modes: tuple[str, ...]
    seconds: float
    compile_limit: float


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Pattern of rows; several add.")] = None,
    modes: Annotated[
        str, typer.Option(help="Of eager, graph, compiled, backward, peak, floor; by commas.")
    ] = "eager,graph,peak,floor",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    shrink: Annotated[int, typer.Option(help="Divide the tokens, for small machines.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time of one measurement.")] = 0.4,
    compile_limit: Annotated[float, typer.Option(help="Seconds that compiling may take.")] = 60,
    limit: Annotated[float, typer.Option(help="Seconds after which no row is begun.")] = 1e9,
    merge: Annotated[bool, typer.Option(help="Add to the file in place of a new one.")] = False,
    commit: Annotated[str | None, typer.Option(help="What is measured, without git.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Times the rows and writes the JSON."""
    rows = chosen(ROWS, only)
    options = Options(
        device, _named("dtype", dtype, DTYPES), shrink, _modes(modes), seconds, compile_limit
    )
    results = Results(
        out or RESULTS / f"run-{device}-{dtype}.json",
        device,
        commit or commit_here(),
        merge=merge,
        dtype=dtype,
        shrink=shrink,
    )
    measured(rows, options, results, limit)
    if any("failed" in results.rows[row.name] for row in rows if row.name in results.rows):
        raise typer.Exit(1)


def chosen(rows: list[Row], patterns: list[str] | None) -> list[Row]:
    """The rows whose names match one of the patterns, or all."""
    found = [
        row
        for row in rows
        if not patterns or any(fnmatch.fnmatchcase(row.name, p) for p in patterns)
    ]
    if not found:
        names = ", ".join(row.name for row in rows)
        raise typer.BadParameter(f"only: no row matches {patterns}; there are {names}")
    return found


def measured(rows: list[Row], options: Options, results: Results, limit: float) -> None:
    """Measures the rows into the file; a row that fails says why and does not end the run."""
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
    with bar:
        task = bar.add_task("", total=len(rows))
        for row in rows:
            if time.perf_counter() > end:
                console.print(f"limit: {limit:g} s are over, left out from {row.name} on")
                break
            bar.update(task, description=row.name)
            found = of_row(row, options)
            results.add(row.name, found)
            console.print(_line(row.name, found), highlight=False, soft_wrap=True)
            bar.advance(task)


@torch.no_grad()
def of_row(row: Row, options: Options) -> dict[str, Any]:
    """All that is asked about one row."""
    found: dict[str, Any] = {"class": row.cls}
    try:
        both = pair(row, options.device, options.dtype, options.shrink)
        found["difference"] = both.agree()
    except Exception as problem:
        return found | {"failed": _reason(problem)}
    for mode in options.modes:
        try:
            more = MODES[mode](both, options)
        except Exception as problem:
            more = {"failures": {mode: _reason(problem)}}
        for name, value in more.items():
            found.setdefault(name, {}).update(value)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return found


def _eager(both: Pair, options: Options) -> Found:
    calls = {side: both.call(side) for side in SIDES}
    found = _times("eager", by_turns(calls, options.device, 2 * options.seconds))
    if options.device == "cuda":
        more = _times("host", host(calls, options.device, options.seconds / 2))
        found = {side: found[side] | more[side] for side in SIDES}
    return found


def _graph(both: Pair, options: Options) -> Found:
    if options.device != "cuda":
        return {}
    calls, failures = _each(lambda side: graphed(both.call(side)), "graph")
    return _times("graph", by_turns(calls, "cuda", 2 * options.seconds)) | failures


def _compiled(both: Pair, options: Options) -> Found:
    compiling.forget()
    made, failures = _each(
        lambda side: compiling.compiled(both.call(side), options.compile_limit), "compiled"
    )
    right = _first(both.call("diffusers")())
    found: Found = {side: one.facts() for side, one in made.items()}
    for side, one in made.items():
        found[side]["compiled_difference"] = difference(_first(one.call()), right)
    del right
    calls = {side: one.call for side, one in made.items()}
    times = _times("compiled", by_turns(calls, options.device, 2 * options.seconds))
    compiling.forget()
    return {side: found[side] | times[side] for side in found} | failures


def _backward(both: Pair, options: Options) -> Found:
    gate = {"gate": {"gradient_difference": both.gradients_agree()}}
    steps = {side: both.step(side) for side in SIDES}
    found = _times("backward", by_turns(steps, options.device, 2 * options.seconds))
    failures: Found = {}
    if options.device == "cuda":
        calls, failures = _each(lambda side: graphed(steps[side]), "backward graph")
        more = _times("backward_graph", by_turns(calls, "cuda", 2 * options.seconds))
        found = {side: found[side] | more.get(side, {}) for side in SIDES}
    return gate | found | failures


def _peak(both: Pair, options: Options) -> Found:
    found: Found = {}
    for side in SIDES:
        found[side] = {"peak_mib": round(peak_mib(both.call(side), options.device), 2)}
        if "backward" in options.modes:
            mib = peak_mib(both.step(side), options.device)
            found[side]["backward_peak_mib"] = round(mib, 2)
    return found


def _floor(both: Pair, options: Options) -> Found:
    return {"floor": floors.floor(both, options.seconds)}


# In this order whatever is asked: a call that can't be captured may leave the device unwell.
MODES: dict[str, Callable[[Pair, Options], Found]] = {
    "eager": _eager,
    "peak": _peak,
    "floor": _floor,
    "backward": _backward,
    "compiled": _compiled,
    "graph": _graph,
}


def _each(make: Callable[[str], Any], mode: str) -> tuple[dict[str, Any], Found]:
    """What `make` gives for each side, and why it gave none."""
    made: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for side in SIDES:
        try:
            made[side] = make(side)
        except Exception as problem:
            failures[f"{side} {mode}"] = _reason(problem)
    return made, {"failures": failures} if failures else {}


def _times(mode: str, times: dict[str, Any]) -> Found:
    return {side: some.named(mode) for side, some in times.items()}


def _first(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def _reason(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:300]


def _modes(text: str) -> tuple[str, ...]:
    asked = [_named("modes", mode.strip(), {m: m for m in MODES}) for mode in text.split(",")]
    return tuple(mode for mode in MODES if mode in asked)


def _named(option: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise typer.BadParameter(f"{option} is {name!r}: choose of {', '.join(known)}")
    return known[name]


def _line(name: str, found: dict[str, Any]) -> str:
    """A row's figures as ours / diffusers', in ms."""
    if "failed" in found:
        return f"{name:26} failed: {found['failed']}"
    parts = [f"{name:26}"]
    for key in found.get("ours", {}):
        if key.endswith(("_ms", "peak_mib")) and "_min_" not in key:
            pair = (f"{found.get(side, {}).get(key, float('nan')):.3f}" for side in SIDES)
            parts.append(f"{key.removesuffix('_ms')} {'/'.join(pair)}")
    if "floor" in found:
        parts.append(f"floor {found['floor']['ms']:.3f}")
    if "graphs" in found.get("ours", {}):
        parts.append(f"breaks {found['ours']['breaks']}")
    return "  ".join(parts + [f"{k}: {v}" for k, v in found.get("failures", {}).items()])


if __name__ == "__main__":
    typer.run(main)
