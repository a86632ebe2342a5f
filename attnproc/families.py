"""Which preset takes a processor's place when its module is asked for another backend.

The switches of diffusers' attention modules (`set_attention_slice`, `set_use_..._attention`) name
a backend, not a class. Here a processor keeps its family, its weights and its settings; diffusers
puts the plain UNet class in place of most others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

__all__ = ["FAMILIES", "preset", "switched"]


@dataclass(frozen=True)
class Family:
    """Classes that differ in nothing but their backend.

    Args:
        presets: the class that stands for each backend.
        others: further members, which no switch leads to.
        takes: constructor arguments that carry over, read off the processor.
    """

    presets: Mapping[str, str]
    others: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()

    def holds(self, processor: object) -> bool:
        """Whether `processor` is of this family, by name, so that diffusers' classes count."""
        members = {*self.presets.values(), *self.others}
        return any(kind.__name__ in members for kind in type(processor).__mro__)


_SIZES = ("hidden_size", "cross_attention_dim")
_PLAIN = Family(
    {
        "sdpa": "AttnProcessor2_0",
        "xformers": "XFormersAttnProcessor",
        "npu": "AttnProcessorNPU",
        "xla": "XLAFlashAttnProcessor2_0",
        "sliced": "SlicedAttnProcessor",
    },
    others=("AttnProcessor",),
)
# A more particular family comes before the one whose classes it may inherit from.
FAMILIES = (
    Family(
        {
            "sdpa": "CustomDiffusionAttnProcessor2_0",
            "xformers": "CustomDiffusionXFormersAttnProcessor",
        },
        others=("CustomDiffusionAttnProcessor",),
        takes=("train_kv", "train_q_out", *_SIZES),
    ),
    Family(
        {"sdpa": "IPAdapterAttnProcessor2_0", "xformers": "IPAdapterXFormersAttnProcessor"},
        others=("IPAdapterAttnProcessor",),
        takes=(*_SIZES, "num_tokens", "scale"),
    ),
    Family(
        {
            "sdpa": "AttnAddedKVProcessor2_0",
            "xformers": "XFormersAttnAddedKVProcessor",
            "sliced": "SlicedAttnAddedKVProcessor",
        },
        others=("AttnAddedKVProcessor",),
    ),
    Family({"sdpa": "JointAttnProcessor2_0", "xformers": "XFormersJointAttnProcessor"}),
    Family({"sdpa": "FluxAttnProcessor2_0", "xla": "XLAFluxFlashAttnProcessor2_0"}),
    _PLAIN,
)


def preset(name: str) -> Callable[..., Any]:
    """The processor class of that name, imported on first use."""
    return getattr(import_module("attnproc.presets"), name)


def switched(processor: object, backend: str, **options: object) -> Callable[..., Any]:
    """`processor` on another backend: its family's preset, or itself with other parts.

    Args:
        processor: the processor in use.
        backend: `"sdpa"`, `"xformers"`, `"npu"`, `"xla"` or `"sliced"`.
        **options: constructor arguments of the preset; None stands for not given.

    Returns:
        A new processor that shares the weights of `processor`.

    Raises:
        ValueError: `processor` can't run on that backend.
    """
    given = {name: value for name, value in options.items() if value is not None}
    family = next((family for family in FAMILIES if family.holds(processor)), None)
    if family is not None and backend in family.presets:
        made = _carried(processor, family, family.presets[backend], given)
        if not _composed(processor, made):
            return made

    recipe, but = (getattr(processor, name, None) for name in ("recipe", "but"))
    if recipe is None or but is None or recipe.kernel.linear:
        possible = "none" if family is None else ", ".join(sorted(family.presets))
        raise ValueError(
            f"processor: {type(processor).__name__} can't run on {backend!r};"
            f" possible for it are {possible}"
        )
    plain = preset(_PLAIN.presets[backend])(**given).recipe
    slices = tuple(part for part in plain.around if _slices(part))
    kept = tuple(part for part in recipe.around if not _slices(part))
    # Slices count heads through the batch, which guidance must have split by then.
    around = (*kept, *slices)
    if backend == "sliced":
        return but(around=around)
    changed = but(around=around, kernel=plain.kernel)
    # A kernel that was named from outside would go before the recipe's.
    changed._attention_backend = None
    return changed


def _carried(
    processor: object, family: Family, name: str, given: Mapping[str, object]
) -> Callable[..., Any]:
    kept = {key: getattr(processor, key) for key in family.takes if hasattr(processor, key)}
    made = preset(name)(**kept, **given)
    if isinstance(processor, nn.Module):
        # The modules themselves move: optimizers, devices and adapters on them stay valid.
        for key, child in processor.named_children():
            setattr(made, key, child)
        if isinstance(made, nn.Module):
            made.train(processor.training)
    return made


def _composed(processor: object, made: object) -> bool:
    """Whether `processor` has parts (a LoRA, a guidance) that neither its class nor `made` has."""
    recipe = getattr(processor, "recipe", None)
    plain = [getattr(owner, "recipe", None) for owner in (type(processor), made)]
    return recipe is not None and _bare(recipe) not in map(_bare, plain)


def _bare(recipe: Any) -> Any:
    """A recipe without what a switch changes."""
    if recipe is None:
        return None
    around = tuple(part for part in recipe.around if not _slices(part))
    return recipe.but(kernel=None, around=around)


def _slices(part: object) -> bool:
    return type(part).__name__ == "Sliced"
