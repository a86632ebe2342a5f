"""A recipe in words."""

from __future__ import annotations

import dataclasses
from typing import Any

from .kernels import Kernel
from .types import Recipe

__all__ = ["parts"]


def parts(recipe: Recipe) -> list[tuple[str, str]]:
    """The fields of a recipe, in the order of the line, each with what its parts are called."""
    return [
        (field.name, _shown(getattr(recipe, field.name))) for field in dataclasses.fields(recipe)
    ]


def _shown(part: Any) -> str:
    if isinstance(part, tuple):
        return " · ".join(map(_shown, part)) or "-"
    if part is None:
        return "-"
    if isinstance(part, bool):
        return "yes" if part else "no"
    if not dataclasses.is_dataclass(part):
        return getattr(part, "__name__", str(part))
    if isinstance(part, Kernel):
        return part.name
    options = ", ".join(_shown(getattr(part, f.name)) for f in dataclasses.fields(part))
    return type(part).__name__ + (f"({options})" if options else "")
