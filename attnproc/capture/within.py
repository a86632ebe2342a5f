"""`with attnproc.capture(model, ...) as maps:` around any call of a model or its pipeline."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..interop import processors, put
from ..on import Kind, kind_of
from ..places import Slab
from ..processor import Processor
from ..types import AroundPart
from .chosen import Labels
from .maps import Heads, Maps
from .part import Capture

__all__ = ["capture", "wrapped"]

_INSIDE = ("capture", "pag", "slicing")


@contextmanager
def capture(
    model: nn.Module,
    words: Labels = None,
    layers: str | Sequence[str] = "*",
    *,
    kind: Kind = "cross",
    part: tuple[int, int] = (1, 2),
    regions: Labels = None,
    slab: Slab | None = None,
    steps: Collection[int] | None = None,
    each_step: bool = False,
    heads: Heads = "mean",
    aspect: float = 1.0,
) -> Generator[Maps]:
    """Captures attention maps while the block runs; around any call of the model or its pipeline.

    The processors of the matching layers are replaced by copies for the block, which share their
    weights; what is set on a processor inside the block goes with the copy.

    Args:
        model: A model whose processors are ours, as after `attnproc.swap(model)`.
        words: Positions of keys (tokens of the prompt) by label; several positions are summed. A
            list of positions labels itself; None captures every key.
        layers: Pattern of the paths of attention modules, such as `"*attn2"`, or several.
        kind: `"cross"`, `"self"` or `"joint"`.
        part: Which of how many equal parts of the batch is kept, counted from 0: the second of two
            by default, which is the conditional half under classifier-free guidance. Without
            guidance give (0, 1).
        regions: Parts of the image by label, each a `Box`, or positions of tokens; in self
            attention the queries whose maps are wanted. None is every token.
        slab: Queries and keys: "image-text" (the default), in joint attention also "text-image"
            and "image-image", which is what self attention has.
        steps: Which calls of a layer are kept, counted from 0; None is all.
        each_step: Whether calls are kept apart, as for an animation, in place of their sum.
        heads: "mean" over all heads, over those of a list, or "each" by itself.
        aspect: Height of the image divided by its width.

    Yields:
        The maps, which fill as the model runs.

    Raises:
        ValueError: No layer matches, or a matching layer's processor is not ours.
    """
    slab = slab or ("image-image" if kind == "self" else "image-text")
    chosen: dict[str, Any] = {"regions": regions, "slab": slab, "steps": steps, "heads": heads}
    maps = Maps(words, part, each_step=each_step, aspect=aspect, **chosen)
    with wrapped(model, layers, kind, lambda path: Capture(maps, path)):
        yield maps


@contextmanager
def wrapped(
    model: nn.Module,
    layers: str | Sequence[str],
    kind: Kind,
    part_of: Callable[[str], AroundPart],
) -> Generator[None]:
    """Puts a part around the kernels of some layers for the block.

    Args:
        model: A model whose processors are ours.
        layers: Pattern of the layers' paths, or several.
        kind: Which kind of attention.
        part_of: Makes the part of a layer's path.

    Raises:
        ValueError: No layer matches, or a matching layer's processor is not ours.
    """
    taken: list[tuple[Any, Processor, Processor]] = []
    chosen = _chosen(model, layers, kind)
    try:
        for path, attn in chosen:
            old: Processor = attn.processor
            new = old.but(around=_outside(old.recipe.around, part_of(path)))
            put(attn, new)
            taken.append((attn, old, new))
        yield
    finally:
        for attn, old, new in taken:
            if attn.processor is new:
                put(attn, old)


def _outside(around: tuple[AroundPart, ...], part: AroundPart) -> tuple[AroundPart, ...]:
    """The wrappers with one more: inside of what steers, outside of all else."""
    names = [getattr(wrapper, "name", None) for wrapper in around]
    at = next((i for i, name in enumerate(names) if name in _INSIDE), len(around))
    return (*around[:at], part, *around[at:])


def _chosen(model: nn.Module, layers: str | Sequence[str], kind: Kind) -> list[tuple[str, Any]]:
    patterns = [layers] if isinstance(layers, str) else list(layers)
    found = [(path, attn) for path, attn in processors(model) if kind_of(attn) == kind]
    chosen = [(path, attn) for path, attn in found if _matches(path, patterns)]
    if not chosen:
        have = ", ".join(path for path, _ in found) or "none"
        raise ValueError(f"layers={layers!r} matches no {kind} attention; there are: {have}")
    for path, attn in chosen:
        if not isinstance(attn.processor, Processor):
            raise ValueError(
                f"{path} runs on {type(attn.processor).__name__}, which is not of attnproc: call "
                "attnproc.swap(model) first"
            )
    return chosen


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
