"""What code under `torch.compile` is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant"]

_F = TypeVar("_F", bound=Callable[..., Any])


def constant(function: _F) -> _F:
    """Lets compiled code take the function's result as a constant.

    As `torch.compiler.assume_constant_result`, without importing the compiler.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function
