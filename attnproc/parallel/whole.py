"""Whole models over a mesh: attention of models that have no plan for it, and rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..frame import Step
from ..interop import processors, put, swap
from ..processor import Processor
from ..types import OutputPart, Site
from .config import spread_of, spread_over
from .exchange import Axis, gather, shares, spans
from .line import takes_own, tokens_of
from .spread import Running, Spread, Text

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["spread_model", "unspread_model"]

_HOOKS = "_attnproc_parallel"


def spread_model(model: nn.Module, mesh: DeviceMesh, *, inside: bool, text: Text) -> list[str]:
    """See `attnproc.parallelize`."""
    if _HOOKS in model.__dict__:
        raise ValueError("model is spread over a mesh already: call unparallelize(model) first")
    swap(model)
    ours = [(p, attn) for p, attn in processors(model) if isinstance(attn.processor, Processor)]
    if not ours:
        raise ValueError("model has no attention module of ours, so nothing can be spread")
    spread = spread_over(mesh, text, inside=inside)
    for _, attn in ours:
        put(attn, _spread(attn.processor, spread))
    hooks: list[Any] = []
    if spread.batch.size > 1:
        rows = _OwnRows(spread.batch, spread.running)
        hooks.append(model.register_forward_pre_hook(rows.before, with_kwargs=True))
        hooks.append(model.register_forward_hook(rows.after, always_call=True))
    model.__dict__[_HOOKS] = hooks
    return [path for path, _ in ours]


def unspread_model(model: nn.Module) -> int:
    """See `attnproc.unparallelize`."""
    for hook in model.__dict__.pop(_HOOKS, ()):
        hook.remove()
    count = 0
    for _, attn in processors(model):
        proc = attn.processor
        if isinstance(proc, Processor) and isinstance(proc._parallel_config, Spread):  # pyright: ignore[reportPrivateUsage]
            put(attn, _alone(proc))
            count += 1
    return count


def _spread(proc: Processor, spread: Spread) -> Processor:
    recipe = proc.recipe
    new = proc.but()
    if spread.inside:
        new = proc.but(frame=(*recipe.frame, OwnTokens()), output=AllTokens(recipe.output))
    new.__dict__["_parallel_config"] = spread
    return new


def _alone(proc: Processor) -> Processor:
    recipe = proc.recipe
    frame = tuple(step for step in recipe.frame if not isinstance(step, OwnTokens))
    output = recipe.output
    new = proc.but(frame=frame, output=output.of if isinstance(output, AllTokens) else output)
    new.__dict__["_parallel_config"] = None
    return new


@dataclass(frozen=True)
class OwnTokens(Step):
    """The rank's own tokens of the input; of the context too, where that is the input."""

    @staticmethod
    def enter(at: Site, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        spread = spread_of(at.proc)
        if spread is None or not takes_own(spread, at.recipe, at.call):
            return x, context
        own = spans(shares(x.shape[1], spread.tokens.size))[spread.tokens.rank]
        if context is not None and at.call.context is at.call.x:
            context = context[:, own]
        return x[:, own], context


@dataclass(frozen=True)
class AllTokens:
    """An output with the tokens of all ranks.

    Args:
        of: The output of own tokens.
    """

    of: OutputPart

    def __call__(
        self, at: Site, o: Tensor, span: tuple[int, int] | None, extra: Tensor | None
    ) -> Any:
        image, text, *rest = self.of(at, o, span, extra)
        spread = spread_of(at.proc)
        if spread is None or not takes_own(spread, at.recipe, at.call):
            return image, text, *rest
        axis = spread.tokens
        counts = shares(tokens_of(at.recipe, at.call.x), axis.size)
        image, *rest = (gather(t, counts, 1, axis) for t in (image, *rest))
        return image, text, *rest


@dataclass(frozen=True)
class _OwnRows:
    """Hooks of a model by which it runs on the rank's own rows of the batch.

    Args:
        axis: The ranks.
        running: Where it says who has which.
    """

    axis: Axis
    running: Running

    def before(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        batch = next((t.shape[0] for t in _tensors((args, kwargs)) if t.ndim > 1), 0)
        if batch < self.axis.size:
            return args, kwargs
        self.running.rows = shares(batch, self.axis.size)
        own = spans(self.running.rows)[self.axis.rank]

        def take(t: Tensor) -> Tensor:
            return t[own] if t.ndim and len(t) == batch else t

        return _each((args, kwargs), take)

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        counts, self.running.rows = self.running.rows, None
        if counts is None or output is None:
            return output
        return _each(output, partial(gather, counts=counts, dim=0, axis=self.axis))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, list | tuple | Mapping):
        return []
    return [t for item in items for t in _tensors(item)]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nest of lists, tuples, dicts and a model's output classes with changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        made: dict[str, Any] = {name: _each(item, change) for name, item in value.items()}
        return made if type(value) is dict else type(value)(**made)
    if isinstance(value, list | tuple):
        items = [_each(item, change) for item in value]
        return type(value)(items)
    return value
