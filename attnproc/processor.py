"""The processor: a recipe, the weights of its adapters, and what callers may set from outside."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from .engine import attend
from .schedules import Weight
from .types import Call, Recipe
from .verbs import Verbs

__all__ = ["Context", "Holder", "KernelSetting", "Processor", "Setting", "grown", "holder"]

Context = Tensor | tuple[Tensor, Any] | None
"""A text, or a text with the states of image prompts."""


class Processor(Verbs):
    """An attention processor: calls the line with its recipe.

    Subclasses give a `recipe`, a `__call__` signature (`attnproc.calls`) and, where they hold
    weights, a constructor. With weights a processor is a module (`Holder`), so that they move,
    train and save with the model's. Without any it is none, as in diffusers, whose pipelines
    write `attn.processor = ...`: torch refuses a plain object where a module was.

    Attributes:
        recipe: The parts. Changed copies come from `but`.
        layer_backend: The kernel of this layer by name, which goes before its model's.
        lora_weights: Weight of each low-rank update by its name; 1 where none is given.
    """

    recipe: Recipe
    layer_backend: Any = None
    _attention_backend: Any = None
    _parallel_config: Any = None
    lora_weights: Mapping[str, Weight] = MappingProxyType({})

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        called: Any = cls.__dict__.get("__call__")
        if called is not None:
            # diffusers asks for it before every call, which takes as long as two launches.
            called.__signature__ = inspect.signature(called)

    # torch's own takes anything, by its signature; a processor without settings takes nothing.
    def __init__(self) -> None:
        super().__init__()
        # On the object itself, where compiled code checks them with one look each.
        self.layer_backend = self._attention_backend = self._parallel_config = None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and not isinstance(self, nn.Module):
            self.__class__ = holder(type(self))
            nn.Module.__init__(cast("nn.Module", self))
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        if isinstance(self, nn.Module):
            return nn.Module.__repr__(self)
        return f"{type(self).__name__}()"

    def run(
        self,
        attn: Any,
        x: Tensor,
        context: Context = None,
        mask: Tensor | None = None,
        temb: Tensor | None = None,
        rope: Any = None,
        states: Any = None,
        masks: Any = None,
        **more: Any,
    ) -> Any:
        """Runs the line for one call, with the arguments of a `Call`.

        Raises:
            ValueError: The context holds image prompts, of which there is none here.
        """
        if isinstance(context, tuple):
            context, states = self._parted(context)
        call = Call(x, context, mask, temb, rope, ip_states=states, ip_masks=masks, **more)
        return attend(self.recipe, self, attn, call)

    def _parted(self, context: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Text and image-prompt states of a context that holds both."""
        if not self.recipe.prompts:
            raise ValueError(
                f"encoder_hidden_states is a tuple (text, image prompts), {type(self).__name__} "
                "has no image prompt: pass the text alone, or give this layer an image prompt"
            )
        return context

    def but(self, **changes: Any) -> Processor:
        """A copy with some parts of the recipe changed; it shares this processor's weights."""
        new = copy.copy(self)
        for registry in ("_modules", "_parameters", "_buffers"):
            if registry in self.__dict__:
                new.__dict__[registry] = dict(self.__dict__[registry])
        new.__dict__["recipe"] = self.recipe.but(**changes)
        return new

    @classmethod
    def settings_of(cls, other: Any) -> dict[str, Any]:
        """The arguments of the constructor that make the likeness of a processor of diffusers."""
        names = inspect.signature(cls.__init__).parameters
        return {name: getattr(other, name) for name in names if hasattr(other, name)}

    def describe(self) -> str:
        """One line a part, in the order of the line."""
        from .describe import parts

        width = max(len(name) for name, _ in parts(self.recipe))
        return "\n".join(f"{name:<{width}}  {part}" for name, part in parts(self.recipe))


class Holder(Processor, nn.Module):
    """A processor that holds weights."""


class _Grown:
    """What a class has that is made of a kind of processors and a kind of modules."""

    grown_from: tuple[type[Processor], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, self.grown_from, self.__dict__


def holder(kind: type[Processor]) -> type[Processor]:
    """The class of processors of a kind that hold weights; the kind itself where all do."""
    return kind if issubclass(kind, nn.Module) else grown(kind, nn.Module)


@cache
def grown(kind: type[Processor], module: type[nn.Module]) -> type[Processor]:
    """The class of processors of a kind that are modules of another kind too."""
    names = ("__module__", "__qualname__", "__doc__")
    own = {name: getattr(kind, name) for name in names} | {"grown_from": (kind, module)}
    return cast("type[Processor]", type(kind.__name__, (_Grown, kind, module), own))


def _empty(kind: type[Processor], module: type[nn.Module]) -> Processor:
    made = grown(kind, module)
    return made.__new__(made)


class Setting:
    """An attribute that callers write and that lives in the recipe, as an option of a part.

    Args:
        field: The field of the recipe, which holds a kernel or a tuple of parts.
        make: Makes the part of the attribute's value.
        option: The part's name for it.
    """

    def __init__(self, field: str, make: type, option: str) -> None:
        self.field, self.make, self.option = field, make, option

    def __get__(self, proc: Processor | None, owner: type | None = None) -> Any:
        if proc is None:
            return self
        part = next(p for p in getattr(proc.recipe, self.field) if isinstance(p, self.make))
        return getattr(part, self.option)

    def __set__(self, proc: Processor, value: Any) -> None:
        others = (p for p in getattr(proc.recipe, self.field) if not isinstance(p, self.make))
        parts = (*others, self.make(value))
        proc.__dict__["recipe"] = proc.recipe.but(**{self.field: parts})


class KernelSetting:
    """An attribute that callers write and that is the recipe's kernel's only option."""

    def __get__(self, proc: Processor | None, owner: type | None = None) -> Any:
        return self if proc is None else proc.recipe.kernel.options[0]

    def __set__(self, proc: Processor, value: Any) -> None:
        old = proc.recipe.kernel
        proc.__dict__["recipe"] = proc.recipe.but(kernel=replace(old, options=(value,)))
