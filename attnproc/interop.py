"""Our processors in a diffusers model, and its own back again.

A module whose processor has a namesake here gets the namesake, which shares its weights. Nothing
of diffusers is patched or imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import presets
from .processor import Processor, grown

__all__ = ["SwapReport", "processors", "restore", "swap"]

# Model-local names of what is one of the 52, or computes the same.
_NAMESAKES = {
    "CrossFrameAttnProcessor2_0": "CrossFrameAttnProcessor",
    "FluxAttnProcessor": "FluxAttnProcessor2_0",
    "FluxIPAdapterAttnProcessor": "FluxIPAdapterJointAttnProcessor2_0",
    "SanaAttnProcessor2_0": "AttnProcessor2_0",
}


@dataclass(frozen=True)
class SwapReport:
    """What `swap` did.

    Attributes:
        replaced: The name of the new processor's class by the module's path.
        kept: Why the processor of a module stayed, by the module's path.
    """

    replaced: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{n} x {name}" for name, n in Counter(self.replaced.values()).items()]
        lines += [f"{n} kept: {why}" for why, n in Counter(self.kept.values()).items()]
        return "\n".join(lines) or "no attention modules"


def swap(model: nn.Module) -> SwapReport:
    """Gives each attention module of a model our processor of the same name.

    Weights are shared, not copied, and attributes (`scale`, `slice_size`, …) carried over.
    Processors that have no namesake here stay, and the report says so. Those with weights remain
    instances of their former class too, for which diffusers' `set_ip_adapter_scale`,
    `unload_ip_adapter` and `save_attn_procs` ask.

    Args:
        model: Any model whose attention modules hold a `processor`, as diffusers' do.

    Returns:
        What was replaced and what was kept.
    """
    replaced, kept = {}, {}
    for path, attn in processors(model):
        old = attn.processor
        if isinstance(old, Processor):
            kept[path] = "is of attnproc already"
        elif (kind := _namesake(old)) is None:
            kept[path] = f"attnproc has no {type(old).__name__}"
        else:
            put(attn, adopt(kind, old))
            replaced[path] = kind.__name__
    return SwapReport(replaced, kept)


def restore(model: nn.Module) -> int:
    """Puts back the processors that `swap` took out; the objects themselves, with their weights.

    Returns:
        How many were put back.
    """
    swapped = [
        (attn, attn.processor.__dict__["swapped"])
        for _, attn in processors(model)
        if "swapped" in vars(attn.processor)
    ]
    for attn, (old,) in swapped:
        put(attn, old)
    return len(swapped)


def processors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attention modules of a model with their paths."""
    for path, module in list(model.named_modules()):
        if callable(getattr(module, "processor", None)):
            yield path, module


def adopt(kind: type[Processor], old: Any) -> Processor:
    """A processor of our class `kind` with the settings and the very weights of `old`."""
    # The weights that the constructor makes give way to those of `old`.
    with torch.device("meta"):
        new = kind(**kind.settings_of(old))
    if isinstance(old, nn.Module) and isinstance(new, nn.Module):
        new.__dict__["_modules"] = dict(old.named_children())
        new.train(old.training)
        # Of both classes: diffusers asks for its own to set scales, take prompts off and save.
        object.__setattr__(new, "__class__", grown(kind, type(old)))
    for name in ("scale", "_attention_backend", "_parallel_config"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    # In a tuple, so that its weights are not registered twice.
    new.__dict__["swapped"] = (old,)
    return new


def put(attn: Any, processor: Any) -> None:
    """Makes `processor` the module's, whether or not either is a module itself."""
    if "processor" in attn._modules:
        del attn.processor
    attn.processor = processor


def _namesake(old: Any) -> type[Processor] | None:
    name = type(old).__name__
    return getattr(presets, _NAMESAKES.get(name, name), None)
