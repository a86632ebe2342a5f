"""The entry point of the command line; importable without its extra."""

import sys

__all__ = ["main"]


def main() -> None:
    """Runs `attnproc`."""
    try:
        from attnproc.app.commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            "attnproc: the command line needs typer and rich: pip install 'attnproc[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app(prog_name="attnproc")
