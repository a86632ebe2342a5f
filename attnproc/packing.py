"""Projections of one input kept as rows of one matrix, so that they take one product.

`pack` moves the weights of ``to_q, to_k, to_v`` (``to_k, to_v`` where queries have another width;
the added ones too) into one storage, of which the three parameters are views. Nothing is stored
twice, and the module's parameters, state keys, optimiser and adapters stay what they were: what is
written to a view is seen by the product, and gradients come to the three parameters.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .interop import processors
from .kernels.fusing import is_autocast

__all__ = ["Packing", "joined", "pack", "unpack"]

# Each is packed as far as its members are there and take an input of the same width.
_GROUPS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))


def pack(module: nn.Module) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Keeps the projections of each attention module in one matrix a stream.

    Args:
        module: An attention module, or a model with any number of them.

    Returns:
        The groups of projections that are now packed, by the module's path.

    Raises:
        ValueError: Some can't be packed; all of them are named, and nothing was changed.
    """
    found = {path: (attn, _groups(attn)) for path, attn in processors(module)}
    refused = [
        f"{path}.{name}".lstrip(".") + f": {why}"
        for path, (attn, groups) in found.items()
        for name, why in _refusals(attn, groups)
    ]
    if refused:
        raise ValueError("these can't be packed:\n  " + "\n  ".join(refused))
    for attn, groups in found.values():
        if groups:
            attn.packing = Packing(tuple(_layers(attn, names) for names in groups))
    return {path: groups for path, (_, groups) in found.items() if groups}


def unpack(module: nn.Module) -> int:
    """Gives each projection its own storage again; all values stay, to the bit.

    Returns:
        How many attention modules were unpacked.
    """
    packed = 0
    for _, attn in processors(module):
        packing = getattr(attn, "packing", None)
        if isinstance(packing, Packing):
            for parameter in itertools.chain.from_iterable(packing.parts()):
                parameter.data = parameter.data.clone()
            del attn.packing
            packed += 1
    return packed


class Packing(nn.Module):
    """The mark of a packed module: a child without weights, which keeps its siblings together.

    Moving, casting, copying and unpickling a module, or loading it with `assign`, give each
    parameter a storage of its own. All of them come to a module's children in order, so this one,
    the last, hears of it after the projections and joins them again.

    Args:
        groups: The layers of each matrix, in the order of their rows.
    """

    def __init__(self, groups: tuple[tuple[nn.Linear, ...], ...]) -> None:
        super().__init__()
        # In a tuple, so that the layers are not registered twice.
        self.groups = groups
        self.join()

    def parts(self) -> list[list[nn.Parameter]]:
        """The parameters of each matrix and each bias."""
        found = [
            _parameters(layers, name) for layers in self.groups for name in ("weight", "bias")
        ]
        return [parts for parts in found if parts]

    @torch.no_grad()
    def join(self) -> None:
        """Makes views of one storage of the parameters that aren't, where they still can be."""
        for parts in self.parts():
            if not _adjacent(parts) and not any(_refusal(part, parts[0]) for part in parts):
                whole = torch.cat([part.data for part in parts])
                rows = whole.split([len(part) for part in parts])
                for part, view in zip(parts, rows, strict=True):
                    part.data = view

    def products(
        self, attn: nn.Module, names: Sequence[str], x: Tensor
    ) -> Sequence[Tensor | None]:
        """The projections `names` of `x` ``[..., C]`` by one product, None each if that can't be.

        It can't where a layer was replaced, wrapped or hooked since the module was packed, and
        where parameters lost their common storage. A compiled call decides that at run time.
        """
        none = [None] * len(names)
        layers = _layers(attn, names)
        if not all(map(_is_plain, layers)):
            return none
        weights, biases = _parameters(layers, "weight"), _parameters(layers, "bias")
        if len(biases) not in (0, len(layers)):
            return none

        if is_autocast(x) and x.dtype is not torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype is not weights[0].dtype:
            return none
        if not torch.compiler.is_compiling() and not (_adjacent(weights) and _adjacent(biases)):
            return none

        parameters = (*weights, *biases)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
            y = _Product.apply(x, len(weights), *parameters)
        else:
            y = _product(x, weights, biases)
        return y.split([len(weight) for weight in weights], dim=-1)

    def extra_repr(self) -> str:
        shapes = ([tuple(part.shape) for part in parts] for parts in self.parts())
        return ", ".join(map(str, shapes))

    def _apply(self, fn: Any, recurse: bool = True) -> Packing:
        super()._apply(fn, recurse)
        self.join()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.join()

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        return type(self)(copy.deepcopy(self.groups, memo))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.join()


class _Product(torch.autograd.Function):
    """The product by all weights, whose gradients are rows of one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        ctx.bias_dtype = biases[0].dtype if biases else None
        ctx.trained = any(ctx.needs_input_grad[2 : 2 + count])
        # A frozen matrix needs no input: training adapters alone keeps it out of memory.
        ctx.save_for_backward(*weights, *([x] if ctx.trained else []))
        return _product(x, weights, biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        saved = ctx.saved_tensors
        weights = saved[:-1] if ctx.trained else saved
        rows = [len(weight) for weight in weights]
        flat = grad.flatten(0, -2)

        for_x = _input_grad(grad, weights) if ctx.needs_input_grad[0] else None
        for_weights = for_biases = [None] * len(rows)
        if ctx.trained:
            whole = flat.mT @ saved[-1].flatten(0, -2)
            for_weights = whole.to(weights[0].dtype).split(rows)
        if ctx.bias_dtype is None:
            return for_x, None, *for_weights
        if any(ctx.needs_input_grad[2 + len(rows) :]):
            for_biases = flat.sum(0).to(ctx.bias_dtype).split(rows)
        return for_x, None, *for_weights, *for_biases


def _product(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """``[..., C]`` times the rows of all weights, in the dtype of `x`."""
    if torch.compiler.is_compiling():
        return packed_linear(x, list(weights), list(biases))
    return F.linear(x, _whole(weights, x.dtype), _whole(biases, x.dtype) if biases else None)


def _input_grad(grad: Tensor, weights: Sequence[Tensor]) -> Tensor:
    if torch.compiler.is_compiling():
        return packed_linear_input_grad(grad, list(weights))
    return grad @ _whole(weights, grad.dtype)


# Operators for compiled graphs: only at run time is it known whether parameters still share their
# storage. Their results are contiguous, as the graph was told.
@torch.library.custom_op("attnproc::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """The product for `_Product`, without a gradient of its own."""
    return _product(x, weights, biases).contiguous()


@packed_linear.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))


@torch.library.custom_op("attnproc::packed_linear_input_grad", mutates_args=())
def packed_linear_input_grad(grad: Tensor, weights: list[Tensor]) -> Tensor:
    """The gradient of `packed_linear` for its input."""
    return _input_grad(grad, weights).contiguous()


@packed_linear_input_grad.register_fake
def _(grad: Tensor, weights: list[Tensor]) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weights[0].shape[1])


def _whole(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts as one tensor: a view where they are views of one, else a copy."""
    first = parts[0]
    if _adjacent(parts):
        rows = sum(len(part) for part in parts)
        whole = first.as_strided((rows, *first.shape[1:]), first.stride())
    else:
        whole = torch.cat(list(parts))
    return whole if first.dtype is dtype else whole.to(dtype)


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of which the parts are views, one after another; None if they aren't."""
    return _whole(parts, parts[0].dtype) if _adjacent(parts) else None


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the parts follow one another in one storage.

    Addresses alone won't do, as two storages may touch; with the offsets they tell it.
    """
    if not parts:
        return True
    address, offset = parts[0].data_ptr(), parts[0].storage_offset()
    for part in parts:
        there = part.data_ptr() == address and part.storage_offset() == offset
        if not there or not address or not part.is_contiguous():
            return False
        address, offset = address + part.nbytes, offset + part.numel()
    return True


def _groups(attn: nn.Module) -> tuple[tuple[str, ...], ...]:
    """What can be kept together: the longest run of each group that ends with its last member."""
    found = []
    for names in _GROUPS:
        there = [name for name in names if getattr(attn, name, None) is not None]
        widths = [getattr(getattr(attn, name), "in_features", None) for name in there]
        group = tuple(n for n, width in zip(there, widths, strict=True) if width == widths[-1])
        if len(group) > 1:
            found.append(group)
    return tuple(found)


def _layers(attn: Any, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(attn._modules[name] for name in names)


def _parameters(layers: Sequence[Any], name: str) -> list[nn.Parameter]:
    """The weights or the biases of layers, without those that are None."""
    # By the registry, as an attribute of a module takes five times as long.
    found = [layer._parameters[name] for layer in layers]
    return [parameter for parameter in found if parameter is not None]


def _is_plain(layer: Any) -> bool:
    """Whether calling the layer is nothing but its product."""
    if type(layer) is not nn.Linear:
        return False
    hooked: Any = layer
    # accelerate and others hook a layer by a `forward` of its own.
    replaced = "forward" in hooked.__dict__
    return not (replaced or hooked._forward_hooks or hooked._forward_pre_hooks)


def _refusals(attn: nn.Module, groups: tuple[tuple[str, ...], ...]) -> list[tuple[str, str]]:
    """The projections that can't be packed, each with the reason."""
    refused: list[tuple[str, str]] = []
    if getattr(attn, "fused_projections", False):
        refused.append(("to_qkv", "is a fused copy of the projections: unfuse them first"))
    for names in groups:
        layers = _layers(attn, names)
        first = next((layer for layer in layers if type(layer) is nn.Linear), None)
        for name, layer in zip(names, layers, strict=True):
            twice = layers.count(layer) > 1
            why = "is one of its siblings too" if twice else _layer_refusal(layer, first)
            if why:
                refused.append((name, why))
    return refused


def _layer_refusal(layer: Any, first: Any) -> str | None:
    if type(layer) is not nn.Linear or first is None:
        return f"is a {type(layer).__name__}, only a plain nn.Linear can be packed"
    if not _is_plain(layer):
        return "has hooks, which one product for all would not call"
    mine, theirs = (
        [part for name in ("weight", "bias") for part in _parameters((one,), name)]
        for one in (layer, first)
    )
    if len(mine) != len(theirs):
        return "differs from its siblings in having a bias"
    return next(filter(None, map(_refusal, mine, theirs)), None)


def _refusal(part: Tensor, first: Tensor) -> str | None:
    if type(part.data) is not Tensor or not part.is_floating_point():
        return f"is quantised or sharded ({type(part.data).__name__}, {part.dtype})"
    for name in ("dtype", "device", "requires_grad"):
        got, need = getattr(part, name), getattr(first, name)
        if got != need:
            return f"has {name} {got}, its siblings {need}"
    return None
