"""The backend of a `with` block: ours, or diffusers' own.

A block of ours holds for its thread or task alone, through a context variable. Code under
`torch.compile` can't read one; there a block is what was entered last in the process, and entering
another compiles anew.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from types import GeneratorType
from typing import Any, NamedTuple

from ..tracing import constant
from .base import named
from .guard import Guard, Watch

__all__ = ["Scope", "backend", "check_fallback", "scope", "within"]


class Scope(NamedTuple):
    """What a block asks for."""

    name: str
    fallback: str | None = None
    watch: Watch | None = None
    """What the calls go through: guard mode, or a recorder."""


_SCOPE: ContextVar[Scope | None] = ContextVar("attnproc_backend", default=None)
# The scopes that are open in any thread or task, in the order of entry; tasks may leave them in
# another. Compiled code is guarded by the last.
_open: list[Scope] = []
_latest: Scope | None = None


@contextmanager
def backend(
    name: Any,
    *,
    fallback: str | None = None,
    max_error: float | None = None,
    calls: int = 3,
) -> Generator[None, None, None]:
    """Runs attention by the kernel of that name within the block.

    It holds for processors and calls of `attnproc.kernels.attention` that name no backend
    themselves, in this thread or task alone.

    Args:
        name: A name of ours or of diffusers, or `"auto"`.
        fallback: `"warn"` runs the automatic choice, with a warning, where that kernel does not
            take a call; None raises.
        max_error: Guard mode: the first calls are compared with the exact kernel, and a larger
            error, relative to the root mean square of the exact output, raises.
        calls: How many calls of each kind are compared; compiled code compares each.

    Raises:
        ValueError: No kernel has that name, or `fallback` is something else.
    """
    check_fallback(fallback)
    guard = None if max_error is None else Guard(named(name).name, max_error, calls)
    with within(name, guard, fallback):
        yield


@contextmanager
def within(
    name: Any, watch: Watch | None, fallback: str | None = None
) -> Generator[None, None, None]:
    """A block whose calls go through `watch`."""
    global _latest
    entered = Scope(named(name).name, fallback, watch)
    token = _SCOPE.set(entered)
    _open.append(entered)
    _latest = entered
    try:
        yield
    finally:
        _SCOPE.reset(token)
        # By identity: scopes of equal content may be open several times.
        del _open[next(i for i, scope in enumerate(_open) if scope is entered)]
        _latest = _open[-1] if _open else None


def check_fallback(fallback: str | None) -> None:
    """Refuses what is no fallback."""
    if fallback not in (None, "warn"):
        raise ValueError(f"fallback is {fallback!r}: give None (raise) or 'warn'")


def scope(compiling: bool) -> Scope | None:
    """The innermost block's wish; diffusers' `attention_backend(...)` where there is none.

    Args:
        compiling: Whether `torch.compile` traces the call.
    """
    if compiling:
        found = _constant_scope()
        # Looked at for the sake of the guards, of which the registry's own needs the fewest.
        active = _active() if _registry is None else _registry._active_backend
        return None if _latest is None and active is None else found
    return _SCOPE.get() or _of_diffusers()


@constant
def _constant_scope() -> Scope | None:
    global _registry
    if "diffusers.models.attention_dispatch" in sys.modules:
        _registry = sys.modules["diffusers.models.attention_dispatch"]._AttentionBackendRegistry
    return _SCOPE.get() or _latest or _of_diffusers()


# diffusers' registry of backends, once compiled code has asked for it.
_registry: Any = None


def _active() -> Any:
    """What diffusers' registry calls active; None without diffusers."""
    module = sys.modules.get("diffusers.models.attention_dispatch")
    return None if module is None else module._AttentionBackendRegistry._active_backend


class _Found(NamedTuple):
    """What was found out about diffusers' registry when it last changed."""

    active: Any = None
    """What it called active then."""
    block: weakref.ref[GeneratorType[Any, Any, Any]] | None = None
    """The innermost block that was open; None if the active one is nobody's business."""
    wish: Scope | None = None
    outer: Any = None
    """What had been found out before that block was entered."""


# `model.set_attention_backend` leaves its backend active for the whole process, which is no
# business of other models; a `with` block makes it active too. diffusers keeps no sign of which it
# was, except that a block's generator is alive, and only the collector knows all of these. To look
# through the youngest objects takes a tenth of a millisecond, through all of them a tenth of a
# second: so it is done when the active one has changed, not when attention is called, and leaving
# a block goes back to what was known before it. A block of what is active already is not noticed.
_found = _Found()


def _of_diffusers() -> Scope | None:
    global _found
    active, found = _active(), _found
    if active is None:
        return None
    if active is not found.active or (found.block is not None and not _is_open(found)):
        found = _found = _looked(active, found)
    return found.wish


def _looked(active: Any, found: _Found) -> _Found:
    while not _is_open(found):
        found = found.outer
    if active is found.active:
        return found
    # The first one is the process's default, whatever it is.
    first = found.active is None and active.value == "native"
    block = None if first else _open_block()
    if block is None:
        return _Found(active)
    if found.block is not None and found.block() is block:
        # A model's setter was called inside the block.
        return found._replace(active=active)
    frame = block.gi_frame
    name = active if frame is None else frame.f_locals.get("backend", active)
    return _Found(active, weakref.ref(block), Scope(named(name).name), found)


def _open_block() -> GeneratorType[Any, Any, Any] | None:
    """The generator of the innermost `attention_backend(...)` block that is open, if one is."""
    manager = sys.modules["diffusers.models.attention_dispatch"].attention_backend
    code = getattr(manager, "__wrapped__", manager).__code__
    for generation in range(3):
        blocks = [
            thing
            for thing in gc.get_objects(generation)
            # By type alone: asking a dead weak proxy for its class raises.
            if type(thing) is GeneratorType
            and thing.gi_code is code
            and thing.gi_frame is not None
        ]
        if blocks:
            # The collector keeps them in the order in which they were made.
            return blocks[-1]
    return None


def _is_open(found: _Found) -> bool:
    """Whether the block is; without one nothing can end."""
    if found.block is None:
        return True
    generator = found.block()
    return generator is not None and generator.gi_frame is not None
