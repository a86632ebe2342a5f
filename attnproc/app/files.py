"""Writing result files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnproc.app.faults import Fault

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["check_png", "numbered", "save", "shown"]


def check_png(path: Path) -> None:
    """Finds out whether a PNG can be written to `path`, without leaving anything there.

    Raises:
        Fault: It can't.
    """
    if path.suffix.lower() != ".png":
        raise Fault(f"{path}: the pictures are PNG, give a name that ends in .png")
    if path.is_dir():
        raise Fault(f"{path} is a folder, give the name of a file in it")
    if not path.parent.is_dir():
        raise Fault(f"{path} can't be written: there is no folder {path.parent}")
    if path.exists() and not os.access(path, os.W_OK):
        raise Fault(f"{path} is there already and can't be written")
    with _beside(path):
        pass


def save(picture: Image, path: Path) -> None:
    """Writes a picture as PNG; until it is whole, what was at `path` stays.

    Raises:
        Fault: The file can't be written.
    """
    with _beside(path) as partial:
        try:
            picture.save(partial, format="PNG", optimize=True)
            partial.replace(path)
        except OSError as error:
            raise Fault(f"{path} can't be written: {error.strerror or error}") from error


def numbered(path: Path, count: int) -> list[Path]:
    """`path` for one picture; for more, `name-1.png`, `name-2.png`, …"""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]


def shown(paths: list[Path]) -> str:
    """The first and last of a row of files."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1].name}"


@contextmanager
def _beside(path: Path) -> Generator[Path]:
    """An empty file in the folder of `path`, removed in the end if it is still there."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".part", dir=path.parent)
    except OSError as error:
        raise Fault(f"{path} can't be written: {error.strerror or error}") from error
    os.close(handle)
    partial = Path(name)
    try:
        # mkstemp makes files that only their owner reads.
        partial.chmod(0o666 & ~_umask())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
