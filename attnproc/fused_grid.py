"""Grids by faster kernels, where they can stand in for the composed parts: DC-AE's way in and
way out, and the residual of a grid.

What the parts are decides: plain layers of known form and one dtype, on a GPU or on a CPU that is
slow in it, without gradients. Everything else goes the composed way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import triton
from .kernels.fusing import alike, fusable, is_autocast, keeps_nothing
from .linears import is_watched, module_linear
from .norms import formula
from .types import Site
from .widened import is_slow

__all__ = ["mixed", "normed", "plus", "scaled"]

# Blocks whose `forward` is `proj_out` of `proj_in`.
_BLOCKS = (
    "diffusers.models.attention_processor.SanaMultiscaleAttentionProjection",
    "attnproc.modules.SanaMultiscaleAttentionProjection",
)
# Widths of a neighbourhood, and channels of a group, that the kernels take.
_NEIGHBOURS = (1, 3, 5, 7, 9)
_GROUP = 128


def scaled(at: Site, names: tuple[str, ...], x: Tensor) -> Tensor | None:
    """The projections of a grid and their convolved copies; None where no kernel can.

    Args:
        at: Where the module and the recipe are.
        names: The projections.
        x: ``[B, C, height, width]``.

    Returns:
        ``[B, height * width, (1 + scales) * 3W]``.
    """
    if x.ndim != 4 or not _takes(x) or at.recipe.linears != (module_linear,):
        return None
    weights: list[Any] = [_weight(at.held(name), nn.Linear, x) for name in names]
    convolutions: list[Any] = []
    for block in at.held("to_qkv_multiscale"):
        convolutions += _convolutions(block, x)
    found = [*weights, *convolutions]
    if any(weight is None for weight in found) or _needs_gradient([x, *found]):
        return None
    channels = sum(weight.shape[0] for weight in weights)
    if any(weight.shape[0] != channels for weight in convolutions):
        return None
    return triton.multiscale.scaled_products(x, weights, convolutions[::2], convolutions[1::2])


def mixed(block: Any, x: Tensor) -> Tensor:
    """What a block makes of queries, keys and values ``[B, 3W, height, width]``."""
    near, within = _convolutions(block, x)
    if near is None or within is None or not is_slow(x, near):
        return block(x)
    channels, side = near.shape[0], near.shape[2]
    y = F.conv2d(x.float(), near.float(), padding=side // 2, groups=channels).to(x.dtype)
    return F.conv2d(y.float(), within.float(), groups=channels // within.shape[1]).to(x.dtype)


def normed(at: Site, y: Tensor, x: Tensor | None) -> Tensor | None:
    """Tokens ``[B, S, C]`` normed by the module, plus `x`, as a grid; None where no kernel can."""
    if not _takes(y):
        return None
    known = formula(at.held("norm_out"), 1, y.shape[2], y.dtype)
    if known is None or known.kind != "rms":
        return None
    others = [t for t in (x, known.weight, known.bias) if t is not None]
    where = y.get_device()
    for t in others:
        if t.dtype is not y.dtype or t.get_device() != where:
            return None
    fits = x is None or x.shape[:2] == (y.shape[0], y.shape[2])
    if not fits or _needs_gradient([y, *others]):
        return None
    return triton.multiscale.normed_grid(y, x, at.call.x, (known.weight, known.bias, known.eps))


def plus(image: Tensor, x: Tensor) -> Tensor:
    """``image + x``, where the image may be tokens that are seen as a grid."""
    if keeps_nothing() and fusable(x) and _crosswise(image, x):
        return triton.residual.tokens_plus_grid(image, x)
    return image + x


def _crosswise(image: Tensor, x: Tensor) -> bool:
    """Whether channels lie side by side in one and far apart in the other."""
    return (
        image.ndim == 4
        and image.shape == x.shape
        and image.dtype is x.dtype
        and image.get_device() == x.get_device()
        and type(x) is type(image) is Tensor
        and x.is_contiguous()
        and image.is_contiguous(memory_format=torch.channels_last)
        and not image.is_contiguous()
    )


def _takes(x: Tensor) -> bool:
    return fusable(x) and not is_autocast(x)


def _needs_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _convolutions(block: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weights of a depthwise convolution and of the grouped 1x1 after it."""
    form = type(block)
    if f"{form.__module__}.{form.__qualname__}" not in _BLOCKS or is_watched(block):
        return None, None
    layers = block._modules
    return _depthwise(layers["proj_in"], like), _grouped(layers["proj_out"], like)


def _depthwise(layer: Any, like: Tensor) -> Tensor | None:
    weight = _weight(layer, nn.Conv2d, like)
    if weight is None:
        return None
    _, each, size, other = weight.shape
    square = each == 1 and size == other and size in _NEIGHBOURS
    return weight if square and _is_even(layer, size // 2) else None


def _grouped(layer: Any, like: Tensor) -> Tensor | None:
    weight = _weight(layer, nn.Conv2d, like)
    if weight is None:
        return None
    channels, each, *size = weight.shape
    mixes = each <= _GROUP and layer.groups * each == channels and size == [1, 1]
    return weight if mixes and _is_even(layer, 0) else None


def _is_even(layer: Any, padding: int) -> bool:
    """Whether a convolution goes over all pixels alike, with zeros around them."""
    if layer.padding_mode != "zeros" or layer.padding != (padding, padding):
        return False
    return layer.stride == (1, 1) and layer.dilation == (1, 1)


def _weight(layer: Any, kind: type[nn.Module], like: Tensor) -> Tensor | None:
    """The weight of a layer that does nothing but its product with it."""
    if layer.__class__ is not kind or is_watched(layer):
        return None
    # By the registry, as an attribute of a module takes five times as long.
    held = layer._parameters
    weight = held.get("weight")
    if held.get("bias") is not None or not alike(weight, like):
        return None
    return weight if weight.is_contiguous() else None
