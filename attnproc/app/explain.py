"""`attnproc explain`: which kernel runs a call, and why each other would or would not."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attnproc.app.faults import Fault

__all__ = ["explain", "kind_of"]

Shape = Annotated[
    str,
    typer.Option(
        metavar="B,H,Q,D",
        help="Batch, heads, queries and channels a head, such as 2,24,4096,64.",
        show_default=False,
    ),
]
KeyCount = Annotated[
    int | None,
    typer.Option("--keys", min=1, help="How many keys; as many as queries unless given."),
]
KeyHeads = Annotated[
    int | None, typer.Option(min=1, help="Heads of the keys; as many as of queries unless given.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Masks = Annotated[
    str,
    typer.Option(
        help="What masks the call: keys, dense, bias, learned, causal, window, blocks; "
        "several with commas."
    ),
]
WindowSize = Annotated[
    str | None,
    typer.Option(metavar="LEFT,RIGHT", help="A window's reach, such as 512,512: masks the call."),
]
Hardware = Annotated[
    str | None, typer.Option(help="cuda, cpu or another; cuda where there is one unless given.")
]
Backward = Annotated[bool, typer.Option("--backward", help="Gradients are wanted.")]


def explain(
    shape: Shape,
    keys: KeyCount = None,
    key_heads: KeyHeads = None,
    dtype: Dtype = "bfloat16",
    mask: Masks = "",
    window: WindowSize = None,
    device: Hardware = None,
    backward: Backward = False,
    backend: Annotated[
        str | None, typer.Option(help="A kernel's name, to see whether it would run.")
    ] = None,
) -> None:
    """Show which kernel runs an attention call, and why each other would or would not."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from attnproc.kernels.explanation import verdicts

    asked = kind_of(shape, keys, key_heads, dtype, mask, device, backward, window)
    try:
        found = verdicts(asked, backend)
    except ValueError as error:
        raise Fault(str(error)) from error
    table = Table("kernel", "runs", "why", title_justify="left")
    for verdict in found.verdicts:
        name = f"[bold]{verdict.name}[/]" if verdict.name == found.chosen else verdict.name
        why = "; ".join(verdict.reasons) or verdict.note.removeprefix("would run; ")
        table.add_row(name, "yes" if verdict.runs else "no", escape(why))
    console = Console()
    console.print(table)
    console.print(f"{found.chosen} runs this call: {found.why}", highlight=False)


def kind_of(
    shape: str,
    keys: int | None,
    key_heads: int | None,
    dtype: str,
    mask: str,
    device: str | None,
    backward: bool,
    window: str | None = None,
) -> Any:
    """The kind of call that the options describe.

    Raises:
        Fault: An option does not say what it should.
    """
    import torch

    from attnproc.kernels.takes import KINDS, Ask

    sizes = shape.replace("x", ",").split(",")
    if len(sizes) != 4 or not all(size.strip().isdigit() and int(size) for size in sizes):
        raise Fault(f"--shape is {shape!r}: give four numbers B,H,Q,D, such as 2,24,4096,64")
    batch, heads, queries, dim = map(int, sizes)
    if heads % (key_heads or heads):
        raise Fault(f"--key-heads is {key_heads}: it must divide the {heads} heads of queries")
    masks = frozenset(kind.strip() for kind in mask.split(",") if kind.strip())
    if masks - KINDS:
        raise Fault(f"--mask is {mask!r}: there are {', '.join(sorted(KINDS))}")
    reach = None if window is None else _reach(window)
    masks = masks if reach is None else masks | {"window"}
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
    type_ = getattr(torch, names.get(dtype, dtype), None)
    if not isinstance(type_, torch.dtype) or not type_.is_floating_point:
        raise Fault(f"--dtype is {dtype!r}: give float32, bfloat16, float16 or float64")
    return Ask(
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=type_,
        batch=batch,
        heads=heads,
        kv_heads=key_heads or heads,
        queries=queries,
        keys=keys or queries,
        dim=dim,
        v_dim=dim,
        kinds=masks,
        backward=backward,
        lse=False,
        dropout=False,
        compiling=False,
        window=reach,
    )


def _reach(window: str) -> tuple[int, int]:
    sizes = [size.strip() for size in window.split(",")]
    if len(sizes) != 2 or not all(size.isdigit() for size in sizes):
        raise Fault(f"--window is {window!r}: give two numbers LEFT,RIGHT, such as 512,512")
    return int(sizes[0]), int(sizes[1])
