"""The commands, as one typer application."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import attnproc
from attnproc.app.autotune import autotune
from attnproc.app.compare import compare
from attnproc.app.doctor import doctor
from attnproc.app.edit import edit
from attnproc.app.explain import explain
from attnproc.app.faults import Fault, missing
from attnproc.app.generate import generate
from attnproc.app.listing import list_processors
from attnproc.app.terminal import fail, say

__all__ = ["app"]


class Commands(TyperGroup):
    """Reports what a user can put right in one line, with exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Fault as fault:
            reason = fault
        except ModuleNotFoundError as error:
            reason = missing(error)
            if reason is None:
                raise
        fail(str(reason))
        raise typer.Exit(2)


app = typer.Typer(
    cls=Commands,
    help="Attention processors for diffusion models, composed of parts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"attnproc {attnproc.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


app.command()(generate)
app.command()(edit)
app.command()(compare)
app.command("list")(list_processors)
app.command()(doctor)
app.command()(explain)
app.command()(autotune)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help="Run every processor in every configuration against its reference.",
)
def verify(context: typer.Context) -> None:
    """Hands over to `attnproc.verify`, which is slow to import."""
    from attnproc.verify.run import app as inner

    status = inner(context.args, prog_name="attnproc verify", standalone_mode=False)
    raise typer.Exit(status or 0)
