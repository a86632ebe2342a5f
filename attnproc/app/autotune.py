"""`attnproc autotune`: times the kernels at real shapes here, and keeps what is fastest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnproc.app.explain import (
    Backward,
    Dtype,
    Hardware,
    KeyCount,
    KeyHeads,
    Masks,
    WindowSize,
    kind_of,
)
from attnproc.app.faults import Fault

if TYPE_CHECKING:
    from attnproc.kernels.timing import Tuned

__all__ = ["MODELS", "autotune"]

# Batch, heads, queries, channels; keys; heads of keys; masks: the calls of published models.
MODELS: dict[str, tuple[tuple[str, int | None, int | None, str], ...]] = {
    "sd15": (("2,8,4096,40", None, None, ""), ("2,8,4096,40", 77, None, "")),
    "sdxl": (
        ("2,10,4096,64", None, None, ""),
        ("2,10,4096,64", 77, None, ""),
        ("2,20,1024,64", None, None, ""),
        ("2,20,1024,64", 77, None, ""),
    ),
    "sd3": (("2,24,4429,64", None, None, ""),),
    "sd35": (("2,38,4429,64", None, None, ""),),
    "flux": (("1,24,4608,128", None, None, ""),),
    "auraflow": (("1,12,4352,256", None, None, ""),),
    "cogvideox": (("1,48,17776,64", None, None, ""),),
    "hunyuandit": (("2,16,4096,88", None, None, ""),),
    "lumina": (("2,32,4096,72", None, 8, "keys"),),
    "mochi": (("2,24,16640,128", None, None, "keys"),),
}


def autotune(
    model: Annotated[
        str | None,
        typer.Argument(help=f"A model's shapes: {', '.join(MODELS)}.", show_default=False),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="B,H,Q,D", help="A shape of your own in its place.")
    ] = None,
    keys: KeyCount = None,
    key_heads: KeyHeads = None,
    dtype: Dtype = "bfloat16",
    mask: Masks = "",
    window: WindowSize = None,
    backward: Backward = False,
    max_error: Annotated[
        float | None,
        typer.Option(help="Let quantised kernels win up to this relative error."),
    ] = None,
    device: Hardware = None,
    file: Annotated[Path | None, typer.Option(help="The table; the usual one if none.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each kernel.")] = 0.2,
) -> None:
    """Time the kernels at real shapes on this machine, and keep the table of the fastest.

    The automatic choice goes by the table from then on. For a model of your own, call
    attnproc.autotune(lambda: pipe(prompt)) in Python: it finds the shapes itself.
    """
    from rich.console import Console

    from attnproc.kernels.timing import autotune as tune
    from attnproc.kernels.timing import untimed
    from attnproc.kernels.tuned import default_path

    if (model is None) == (shape is None):
        raise Fault(f"give a model ({', '.join(MODELS)}) or a --shape, one of them")
    if shape is None and model not in MODELS:
        raise Fault(f"there are no shapes of {model!r}, there are {', '.join(MODELS)}")
    calls = MODELS.get(model or "", ((shape or "", keys, key_heads, mask),))
    asks = [kind_of(s, k, h, dtype, m, device, backward, window) for s, k, h, m in calls]
    if reasons := [reason for asked in asks if (reason := untimed(asked))]:
        raise Fault(f"--mask: {reasons[0]}" + (": --window" if "window" in reasons[0] else ""))
    console = Console()
    for outcome in tune(asks, max_error=max_error, seconds=seconds, path=file):
        console.print(_table(outcome))
    console.print(f"written to {file or default_path()}", soft_wrap=True, highlight=False)


def _table(outcome: Tuned) -> object:
    from rich.markup import escape
    from rich.table import Table

    from attnproc.kernels.tuned import key_of

    table = Table("kernel", "ms", "error", title=key_of(outcome.asked), title_justify="left")
    for timing in outcome.timings:
        name = f"[bold]{timing.name}[/]" if timing.name == outcome.best else timing.name
        if timing.failed:
            table.add_row(name, "-", escape(timing.failed))
        else:
            table.add_row(name, f"{timing.ms:.3f}", f"{timing.error:.1e}")
    return table
