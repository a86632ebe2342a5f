"""Which kernel a processor runs: its own setting, its model's, the block's, or its recipe's."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..types import KernelCall, Scoring
from .base import Kernel, named
from .guard import Watch
from .plan import AUTO, checked
from .scope import Scope, scope

if TYPE_CHECKING:
    from ..processor import Processor

__all__ = ["choose", "resolved", "set_backend"]


def choose(kernel: Kernel, proc: Processor, compiling: bool) -> Callable[..., Any]:
    """The kernel call of a processor.

    What is set on the layer goes before what is set on the model, that before the `with` block,
    and the recipe's kernel is the default. Linear attention is another function than softmax
    attention, so no name replaces it.

    Args:
        kernel: The recipe's.
        proc: The processor.
        compiling: Whether `torch.compile` traces the call.
    """
    if kernel.linear:
        return kernel
    name = proc.layer_backend
    if name is None:
        name = proc._attention_backend  # pyright: ignore[reportPrivateUsage]
    wish = scope(compiling) if name is None else Scope(name)
    if wish is None:
        return kernel if kernel.any_mask else partial(checked, kernel, None)
    return resolved(wish)


def resolved(wish: Scope, lse: bool = False) -> Callable[..., Any]:
    """The kernel call that a wish leads to: checked, and guarded if so wished."""
    kernel = named(wish.name)
    if lse:
        return partial(checked, kernel, wish.fallback, lse=True)
    call: Any = kernel if kernel.name == AUTO.name else partial(checked, kernel, wish.fallback)
    return call if wish.watch is None else partial(_watched, wish.watch, call)


def _watched(
    watch: Watch,
    call: KernelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
) -> Tensor:
    return watch.run(call, AUTO, q, k, v, scoring=scoring)


def set_backend(model: nn.Module, name: Any, layers: str | None = None) -> list[str]:
    """Sets the backend of a model's processors, or of some layers, which then keep theirs.

    Args:
        model: A model whose processors are ours.
        name: A name of ours or of diffusers; None takes the setting back.
        layers: Pattern of the paths of attention modules. What is set so goes before what is
            set on the whole model, here or by diffusers' `model.set_attention_backend`.

    Returns:
        The paths of the layers that were set.

    Raises:
        ValueError: No kernel has that name, or no layer of ours matches.
    """
    from ..interop import processors
    from ..processor import Processor

    value = None if name is None else named(name).name
    attribute = "_attention_backend" if layers is None else "layer_backend"
    ours = [
        (path, attn.processor)
        for path, attn in processors(model)
        if isinstance(attn.processor, Processor)
    ]
    done = [path for path, _ in ours if layers is None or fnmatchcase(path, layers)]
    if not done:
        have = ", ".join(path for path, _ in ours) or "none; call attnproc.swap(model) first"
        raise ValueError(f"layers={layers!r} matches no layer of ours, there are: {have}")
    for path, proc in ours:
        if path in done:
            setattr(proc, attribute, value)
    return done
