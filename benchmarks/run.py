"""Times our processors beside diffusers' at the calls of real models, in one run.

    python benchmarks/run.py --device cuda                     # all rows
    python benchmarks/run.py --device cpu --shrink 16 --only "sd*"

Each row first passes a gate: both sides' outputs agree. Then, side by side: the eager call (median
wall time), on a GPU the same call replayed as a CUDA graph, and peak memory above what was held
before. Results go to `benchmarks/results/run-<device>.json` with versions and the command.
"""

from __future__ import annotations

import fnmatch
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rows import ROWS, Row, Setting, make
from torch import Tensor

import attnproc
from attnproc.verify.references import reference

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[str, typer.Option(help="Pattern of the rows' names.")] = "*",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    shrink: Annotated[int, typer.Option(help="Divide the tokens, for small machines.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time a measurement.")] = 0.2,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Times the rows and writes the JSON."""
    rows = [row for row in ROWS if fnmatch.fnmatchcase(row.name, only)]
    results = {row.name: _row(row, device, DTYPES[dtype], shrink, seconds) for row in track(rows)}
    report = {"command": " ".join(sys.argv), "versions": _versions(device), "rows": results}
    path = out or RESULTS / f"run-{device}-{dtype}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    for name, found in results.items():
        print(name, json.dumps(found))


@torch.no_grad()
def _row(row: Row, device: str, dtype: torch.dtype, shrink: int, seconds: float) -> dict[str, Any]:
    setting = make(row, device, dtype, shrink)
    ours = getattr(attnproc, row.cls)(**row.init)
    theirs = reference(row.cls, row.init)
    if isinstance(theirs, torch.nn.Module):
        theirs.to(device, dtype)
        with torch.device("meta"):
            ours = getattr(attnproc, row.cls)(**row.init)
        ours.__dict__["_modules"] = dict(theirs.named_children())
    found: dict[str, Any] = {"class": row.cls}
    try:
        found["difference"] = _difference(setting, ours, theirs)
    except Exception as problem:
        return {**found, "failed": f"{type(problem).__name__}: {problem}"[:300]}
    if not found["difference"] < 2e-2:
        return {**found, "failed": "the outputs differ"}
    for side, processor in (("ours", ours), ("diffusers", theirs)):
        found[side] = _measured(
            lambda p=processor: p(setting.attn, **setting.inputs), device, seconds
        )
    return found


def _difference(setting: Setting, ours: Any, theirs: Any) -> float:
    """Largest difference of the outputs, relative to their size."""
    pairs = zip(*(_flat(p(setting.attn, **setting.inputs)) for p in (ours, theirs)), strict=True)
    return max(
        ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6)).item()
        for a, b in pairs
    )


def _flat(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _measured(call: Callable[[], Any], device: str, seconds: float) -> dict[str, float]:
    for _ in range(3):
        call()
    found = {"eager_ms": _wall(call, device, seconds)}
    if device == "cuda":
        found["peak_mib"] = _peak(call)
        found["graph_ms"] = _graph(call, seconds)
    return found


def _wall(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Median time of a call, each waited for."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _peak(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def _graph(call: Callable[[], Any], seconds: float) -> float | None:
    """Time of the GPU alone; None where the call can't be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return _wall(graph.replay, "cuda", seconds)


def _versions(device: str) -> dict[str, str]:
    import diffusers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "attnproc": attnproc.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    typer.run(main)
