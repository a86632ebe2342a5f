"""Times our processors beside diffusers' at the calls of real models, in one run.

    python benchmarks/run.py --device cuda
    python benchmarks/run.py --device cuda --modes compiled,backward --merge  # adds to that file
    python benchmarks/run.py --shrink 16 --only "sd15*" --only "flux*"  # on a CPU

A row first passes a gate: the outputs of both sides agree, and their gradients before a backward
pass is timed. Then the modes, the sides by turns:

    eager     wall time, amortised over many calls, and `host_ms`, the CPU's cost of a call
    graph     the call replayed as a CUDA graph: the GPU's own time
    compiled  under torch.compile, with the number of graphs and breaks
    replayed  under torch.compile in the mode "reduce-overhead": as a CUDA graph
    backward  forward and backward pass: wall time and, on a GPU, as a graph
    kernels   what the GPU does in a call, kernel by kernel; compiled too if that is asked
    peak      memory above what was held before: forward, and backward if that is asked too
    floor     the linear layers and the fastest attention kernel alone (benchmarks/floor.py);
              on a GPU their calls go by turns with both sides in the modes above, too

On a machine that others share, `--passes 3` goes through the rows three times; of each mode that
pass counts in which all sides together took least. Compiling loads the machine, and the profiler
of `kernels` stays attached to the GPU, so both are best left to runs of their own.

Results go to `benchmarks/results/run-<device>-<dtype>.json` after each row, those of
`--variants` to `variants-<device>-<dtype>.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import floor as floors
import typer
from modes import COMMON, Found, Mode, Options, gated
from results import RESULTS
from rows import ROWS, Row
from session import DTYPES, chosen, chosen_modes, measured, named, opened
from sides import Pair, pair
from variants import VARIANTS


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Pattern of rows; several add.")] = None,
    variants: Annotated[bool, typer.Option(help="Other shapes: benchmarks/variants.py.")] = False,
    modes: Annotated[
        str,
        typer.Option(
            help="Of eager, graph, compiled, replayed, kernels, backward, peak, floor, by commas."
        ),
    ] = "eager,graph,peak,floor",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    shrink: Annotated[
        int | None, typer.Option(help="Divide the tokens; 0, as on a CPU, is by each row's own.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time of one measurement.")] = 0.4,
    compile_limit: Annotated[float, typer.Option(help="Seconds that compiling may take.")] = 60,
    limit: Annotated[float, typer.Option(help="Seconds after which no row is begun.")] = 1e9,
    passes: Annotated[int, typer.Option(help="How often all rows are measured.")] = 1,
    merge: Annotated[bool, typer.Option(help="Add to the file in place of a new one.")] = False,
    commit: Annotated[str | None, typer.Option(help="What is measured, without git.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Times the rows and writes the JSON."""
    rows = chosen(VARIANTS if variants else ROWS, only)
    shrink = int(device != "cpu") if shrink is None else shrink
    options = Options(
        device,
        named("dtype", dtype, DTYPES),
        shrink,
        chosen_modes(modes, MODES),
        seconds,
        compile_limit,
    )
    kind = "variants" if variants else "run"
    path = out or RESULTS / f"{kind}-{device}-{dtype}.json"
    results = opened(path, device, commit, merge, dtype=dtype, shrink=shrink)
    measured(rows, lambda row: of_row(row, options), results, limit, passes)


def of_row(row: Row, options: Options) -> dict[str, Any]:
    """All that is asked about one row."""
    found: dict[str, Any] = {"class": row.cls}

    def make() -> Pair:
        both = pair(row, options.device, options.dtype, options.shrink)
        if "floor" in options.modes and options.device == "cuda":
            both.beside["floor"] = floors.calls(both)
        found.update(x=both.row.x, text=both.row.text)
        return both

    modes = [(name, MODES[name]) for name in options.modes]
    return found | gated(make, modes, options)


def _floor(both: Pair, options: Options) -> Found:
    return {"floor": floors.floor(both, options.seconds)}


# The floor before what may leave the device unwell.
MODES: dict[str, Mode] = {"floor": _floor, **COMMON}


if __name__ == "__main__":
    typer.run(main)
