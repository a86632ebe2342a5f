"""What several commands check before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnproc.app import files, wording
from attnproc.app.terminal import note

__all__ = ["prepare"]


def prepare(prompt: str, paths: Sequence[Path], processor: str | None) -> wording.Prompt:
    """Checks what was given, and tells the user what of it is left out.

    Args:
        prompt: The words.
        paths: Where results will be written.
        processor: The name of a processor; None is the model's own.

    Raises:
        Fault: Something is wrong.
    """
    known = wording.read(prompt)
    for path in paths:
        files.check_png(path)
    if processor is not None:
        from attnproc.app.fitting import find

        find(processor)
    for line in known.notes:
        note(line)
    return known
