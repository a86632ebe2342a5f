"""`attnproc doctor`: what is here, and which kernels work."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

__all__ = ["doctor"]

_PACKAGES = ("attnproc", "torch", "diffusers", "flash-attn", "flash-attn-4", "sageattention")
_MORE = ("xformers", "kernels", "torch-npu", "torch-xla", "triton", "peft")


def doctor(
    device: Annotated[
        str | None, typer.Option(help="Where to try the kernels; cuda where there is one.")
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(help="Try FlexAttention, which compiles: seconds, at first up to a minute."),
    ] = True,
) -> None:
    """Show the device, versions, which kernels work here, and how to get the others.

    A kernel works if it equals attention in float64 on a small case, in values and, where it has
    them, gradients.
    """
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from attnproc.kernels import AUTO, FLEX, registered

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    console.print(f"device: {_device(device)}", highlight=False)
    console.print(f"versions: {_versions()}", highlight=False)
    table = Table("kernel", "works", "", title_justify="left")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for kernel in registered().values():
            if kernel == AUTO:
                continue
            slow = kernel == FLEX
            progress.update(task, description=f"{kernel.name}{' compiles' if slow else ''}")
            skipped = _no_compiler(device, compile) if slow else None
            works, note = ("-", skipped) if skipped else tried(kernel, device)
            kind = note if kernel.takes.exact else f"quantised; {note}"
            table.add_row(kernel.name, works, escape(kind))
    console.print(table)


def _no_compiler(device: str, wanted: bool) -> str | None:
    """Why what compiles is not tried."""
    if not wanted:
        return "not tried, it compiles: leave out --no-compile"
    if device != "cpu":
        from attnproc.kernels.takes import missing

        return missing("triton", "pip install triton")
    names = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if any(shutil.which(name) for name in names if name):
        return None
    return "it compiles C++ on a CPU, and there is no compiler: install g++ or clang++, or set CXX"


def tried(kernel: Any, device: str) -> tuple[str, str]:
    """Whether a kernel works ("yes", "no", "-" where it can't be tried), and what to know."""
    import torch

    from attnproc.kernels import ask, why_not
    from attnproc.kernels.guard import error_of
    from attnproc.kernels.oracle import oracle
    from attnproc.types import Scoring

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 128, 64, device=device, dtype=dtype) for _ in range(3))
    reasons = why_not(kernel.takes, ask(q, k, v, Scoring()))
    if reasons:
        return "-", reasons[0]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    graded = not why_not(kernel.takes, ask(q, k, v, Scoring()))
    for leaf in leaves:
        leaf.requires_grad_(graded)
    try:
        o = kernel(q, k, v, Scoring())
        right = oracle(q, k, v)[0]
        errors = [error_of(o, right)]
        if graded:
            grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
            wanted = torch.autograd.grad(right, leaves, torch.ones_like(right))
            errors += map(error_of, grads, wanted)
    except Exception as error:
        return "no", f"{type(error).__name__}: {error}".splitlines()[0]
    worst, allowed = max(errors), 1e-4 if dtype == torch.float32 else 0.05
    note = f"error {worst:.1e}" + (" with gradients" if graded else "")
    return ("yes", note) if worst <= allowed else ("no", f"{note}, over {allowed:.0e}")


def _device(device: str) -> str:
    import torch

    if device != "cuda":
        return f"{device}, {platform.machine()}, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, sm{major}{minor}, {memory:.0f} GiB"


def _versions() -> str:
    found: list[str] = [f"python {platform.python_version()}"]
    for name in (*_PACKAGES, *_MORE):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
