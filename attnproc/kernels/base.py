"""A kernel is a value: a name, a function of q, k, v and the scoring, and what it takes."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..tracing import constant
from ..types import Scoring
from .names import ALIASES
from .takes import ANYTHING, KINDS, Takes

__all__ = ["GROUP", "Kernel", "named", "package", "register_kernel", "registered"]

GROUP = "attnproc.kernels"
"""The entry-point group of other packages' kernels."""

_REGISTRY: dict[str, Kernel] = {}
_waiting: dict[str, Any] | None = None


@dataclass(frozen=True)
class Kernel:
    """Attention of q ``[B, H, Q, D]`` to k and v ``[B, H', K, D]``, giving ``[B, H, Q, D]``.

    Calling it runs it as it is; whether it takes the call is checked where a kernel is chosen.

    Args:
        name: What it is registered and shown as.
        run: A module-level function (q, k, v, scoring, *options).
        options: Further arguments of `run`, for kernels with settings.
        linear: Whether it is linear attention, which no softmax kernel can stand in for.
        takes: What it takes.
        with_lse: As `run`, giving (output, log-sum-exp ``[B, H, Q]``); None if it can't.
        bounded: Types of devices on which its memory grows with the tokens, not their square.
    """

    name: str
    run: Callable[..., Tensor]
    options: tuple[Any, ...] = ()
    linear: bool = False
    takes: Takes = ANYTHING
    with_lse: Callable[..., tuple[Tensor, Tensor]] | None = None
    bounded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Worked out once: compiled code checks each of the kinds before every call.
        object.__setattr__(self, "any_mask", self.takes.masks == KINDS)

    if TYPE_CHECKING:
        any_mask: ClassVar[bool]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return self.run(q, k, v, scoring, *self.options)


def register_kernel(kernel: Kernel) -> Kernel:
    """Makes a kernel known by its name.

    Raises:
        ValueError: Another kernel has that name.
    """
    if kernel.name in ALIASES or _REGISTRY.setdefault(kernel.name, kernel) != kernel:
        raise ValueError(f"name: a kernel {kernel.name!r} is registered already")
    return kernel


def registered() -> dict[str, Kernel]:
    """All kernels by name, other packages' among them."""
    for name in list(_pending()):
        _load(name)
    return dict(_REGISTRY)


def named(name: Any) -> Kernel:
    """The kernel of a name of ours or of diffusers (also its enum's members).

    Raises:
        ValueError: No kernel has that name.
    """
    text = str(getattr(name, "value", name)).lower()
    kernel = _REGISTRY.get(ALIASES.get(text, text))
    return _found(text) if kernel is None else kernel


@constant
def _found(name: str) -> Kernel:
    """The kernel of another package, imported now."""
    if name in _pending():
        _load(name)
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, [*_REGISTRY, *ALIASES], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        known = ", ".join(_REGISTRY)
        raise ValueError(f"backend {name!r} is not registered, there are {known}{hint}")
    return _REGISTRY[name]


def _pending() -> dict[str, Any]:
    """Entry points that were not loaded yet, by name."""
    global _waiting
    if _waiting is None:
        _waiting = {point.name.lower(): point for point in entry_points(group=GROUP)}
    return _waiting


def _load(name: str) -> None:
    point = _pending().pop(name)
    kernel = point.load()
    if not isinstance(kernel, Kernel) or kernel.name != name:
        raise ValueError(
            f"entry point {name!r} of {GROUP} is {kernel!r}: it must be a Kernel of that name"
        )
    register_kernel(kernel)


def package(module: str, install: str) -> ModuleType:
    """Imports a module of another package.

    Raises:
        ImportError: It is not there; the message says how to install it.
    """
    if sys.modules.get(module) is None:
        _import(module, install)
    return sys.modules[module]


# torch.compile traces no imports, but takes the answer that this one has been made.
@constant
def _import(module: str, install: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"this kernel needs {name}, which is not here: {install}") from error
    return True
