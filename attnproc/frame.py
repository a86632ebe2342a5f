"""Layers around the line: what happens to the input before it and to the result after it.

A frame is a tuple of steps, the outermost first. A step enters on the way in and leaves on the way
out; what it needs of the input it finds in the call, so no step keeps a memo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fused_grid import plus
from .kernels import triton
from .kernels.fusing import alike, fusable, is_autocast, keeps_nothing
from .linears import is_watched
from .shapes import from_grid, to_grid
from .types import Site

__all__ = ["ADDED", "BARE", "GRID", "GRID_IN", "SANA", "STABLE_AUDIO", "TEMPORAL", "UNET", "Step"]


Pair = tuple[Tensor, Tensor | None]
"""The image or input and, with one, the text or context."""


@dataclass(frozen=True)
class Step:
    """A step that does nothing; the steps below override one side or both.

    Steps have no settings, so their sides are static: compiled code checks less than of a method.
    """

    @property
    def enters(self) -> bool:
        return type(self).enter is not Step.enter

    @property
    def leaves(self) -> bool:
        return type(self).leave is not Step.leave

    @staticmethod
    def enter(at: Site, x: Tensor, context: Tensor | None) -> Pair:
        return x, context

    @staticmethod
    def leave(at: Site, image: Tensor, text: Tensor | None) -> Pair:
        return image, text


@dataclass(frozen=True)
class Residual(Step):
    """Adds the input where the module asks for it, then divides by its output factor."""

    @staticmethod
    def leave(at: Site, image: Tensor, text: Tensor | None) -> Pair:
        if at.setting("residual_connection", False):
            image = _plus_input(at, image)
        factor = at.setting("rescale_output_factor", 1.0)
        return image if factor == 1.0 else image / factor, text


@dataclass(frozen=True)
class AlwaysResidual(Step):
    """Adds the input, whatever the module says."""

    @staticmethod
    def leave(at: Site, image: Tensor, text: Tensor | None) -> Pair:
        return _plus_input(at, image), text


@dataclass(frozen=True)
class SpatialNorm(Step):
    """The module's spatial norm, steered by `temb` ``[B, C, height, width]``."""

    @staticmethod
    def enter(at: Site, x: Tensor, context: Tensor | None) -> Pair:
        norm = at.held("spatial_norm")
        return x if norm is None else norm(x, at.call.temb), context


@dataclass(frozen=True)
class GridIn(Step):
    """Grids ``[B, C, height, width]`` become tokens and stay so."""

    @staticmethod
    def enter(at: Site, x: Tensor, context: Tensor | None) -> Pair:
        if x.ndim == 4:
            x = from_grid(x)
        if context is not None and context.ndim == 4:
            context = from_grid(context)
        return x, context


@dataclass(frozen=True)
class Grid(GridIn):
    """Grids become tokens and come back as grids."""

    @staticmethod
    def leave(at: Site, image: Tensor, text: Tensor | None) -> Pair:
        x, context = at.call.x, at.call.context
        if x.ndim == 4:
            image = to_grid(image, x)
        if text is not None and context is not None and context.ndim == 4:
            text = to_grid(text, context)
        return image, text


@dataclass(frozen=True)
class ChannelsFirst(Step):
    """Inputs of any rank with channels second, as the added key-value family has them."""

    @staticmethod
    def enter(at: Site, x: Tensor, context: Tensor | None) -> Pair:
        return from_grid(x), context

    @staticmethod
    def leave(at: Site, image: Tensor, text: Tensor | None) -> Pair:
        return to_grid(image, at.call.x), text


@dataclass(frozen=True)
class GroupNorm(Step):
    """The module's group norm over the channels of the tokens."""

    @staticmethod
    def enter(at: Site, x: Tensor, context: Tensor | None) -> Pair:
        norm = at.held("group_norm")
        return x if norm is None else _over_channels(at, norm, x), context


@dataclass(frozen=True)
class ContextNorm(Step):
    """The module's norm of the context (`cross_attention_norm`)."""

    @staticmethod
    def enter(at: Site, x: Tensor, context: Tensor | None) -> Pair:
        norm = at.held("norm_cross")
        if norm is None or context is None:
            return x, context
        if isinstance(norm, nn.GroupNorm):
            return x, _over_channels(at, norm, context)
        return x, norm(context)


@dataclass(frozen=True)
class ContextOfInput(Step):
    """Without a context, the tokens as they are before the group norm."""

    @staticmethod
    def enter(at: Site, x: Tensor, context: Tensor | None) -> Pair:
        return x, x if context is None else context


@dataclass(frozen=True)
class ClipHalf(Step):
    """Keeps float16 results finite."""

    @staticmethod
    def leave(at: Site, image: Tensor, text: Tensor | None) -> Pair:
        if at.call.x.dtype == torch.float16:
            image = image.clip(-65504, 65504)
        return image, text


def _plus_input(at: Site, image: Tensor) -> Tensor:
    # The compiler makes one kernel of the sum and what is around it.
    return image + at.call.x if at.compiling else plus(image, at.call.x)


def _over_channels(at: Site, norm: Any, x: Tensor) -> Tensor:
    """Tokens ``[B, S, C]`` normed, for which the norm sees ``[B, C, S]``."""
    if not at.compiling and keeps_nothing() and fusable(x) and _is_plain(norm, x):
        home, own = triton.groupnorm, norm._parameters
        if home.fits(x, norm.num_groups):
            return home.group_norm(x, norm.num_groups, own["weight"], own["bias"], norm.eps)
    return norm(x.transpose(1, 2)).transpose(1, 2)


def _is_plain(norm: Any, x: Tensor) -> bool:
    """Whether a norm does nothing but its formula here, in the dtype of `x`."""
    if type(norm) is not nn.GroupNorm or is_watched(norm):
        return False
    own: dict[str, Any] = vars(norm)["_parameters"]
    if "weight" not in own or "bias" not in own:
        # Sharded training holds them as attributes.
        return False
    weight, bias = own["weight"], own["bias"]
    same = (weight is None or alike(weight, x)) and (bias is None or alike(bias, x))
    return same and not is_autocast(x)


UNET = (Residual(), SpatialNorm(), Grid(), GroupNorm(), ContextNorm())
"""All that a U-Net's attention module can hold."""

ADDED = (
    AlwaysResidual(),
    SpatialNorm(),
    ChannelsFirst(),
    ContextNorm(),
    ContextOfInput(),
    GroupNorm(),
)
"""Added keys and values: the context is taken before the norm; always a residual, no rescaling."""

GRID = (Grid(),)
GRID_IN = (GridIn(),)
BARE = (ContextNorm(),)
TEMPORAL = (Residual(),)
"""Video autoencoders: one sequence of frames a pixel."""

STABLE_AUDIO = (Residual(), Grid(), ContextNorm())
SANA = (ClipHalf(),)
