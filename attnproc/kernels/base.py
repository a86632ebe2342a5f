"""A kernel is a value: a name and a function of q, k, v and the scoring."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..types import Scoring

__all__ = ["Kernel", "named", "register_kernel", "registered"]

_REGISTRY: dict[str, Kernel] = {}

# diffusers' names for what has a name of its own here.
_ALIASES = {
    "native": "sdpa",
    "_native_flash": "flash_sdpa",
    "_native_cudnn": "cudnn",
    "_native_efficient": "efficient",
    "_native_math": "math",
    "_native_npu": "npu",
    "_native_xla": "xla",
}


@dataclass(frozen=True)
class Kernel:
    """Attention of q ``[B, H, Q, D]`` to k and v ``[B, H', K, D]``, giving ``[B, H, Q, D]``.

    Args:
        name: What it is registered and shown as.
        run: A module-level function (q, k, v, scoring, *options).
        options: Further arguments of `run`, for kernels with settings.
        linear: Whether it is linear attention, which no softmax kernel can stand in for.
    """

    name: str
    run: Callable[..., Tensor]
    options: tuple[Any, ...] = ()
    linear: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return self.run(q, k, v, scoring, *self.options)


def register_kernel(kernel: Kernel) -> Kernel:
    """Makes a kernel known by its name.

    Raises:
        ValueError: Another kernel has that name.
    """
    if _REGISTRY.setdefault(kernel.name, kernel) != kernel:
        raise ValueError(f"name: a kernel {kernel.name!r} is registered already")
    return kernel


def registered() -> dict[str, Kernel]:
    """All kernels by name."""
    return dict(_REGISTRY)


def named(name: str) -> Kernel:
    """The kernel of a name of ours or of diffusers (also its enum's members).

    Raises:
        ValueError: No kernel has that name.
    """
    name = str(getattr(name, "value", name)).lower()
    kernel = _REGISTRY.get(_ALIASES.get(name, name))
    if kernel is None:
        near = difflib.get_close_matches(name, [*_REGISTRY, *_ALIASES], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        known = ", ".join(_REGISTRY)
        raise ValueError(f"backend {name!r} is not registered, there are {known}{hint}")
    return kernel
