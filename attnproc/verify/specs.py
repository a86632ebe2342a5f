"""What a configuration is made of: frozen data that says how each input is filled.

Every tensor is a function of the case's id, its own name and its shape, drawn in float64 on the
CPU; so both sides of a comparison, on any machine and in any order of construction, get the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "Axes",
    "Case",
    "Halves",
    "ImageMask",
    "Mask",
    "ModuleSpec",
    "Normal",
    "Pairs",
    "Same",
    "Turns",
    "draw",
    "fill",
    "weight",
]

Form = Literal["keys", "bool3", "bool4", "bias", "bias_q", "bias_heads", "prefix", "gaps", "ones"]


@dataclass(frozen=True)
class Normal:
    """A tensor of standard normal numbers that gradients are taken for."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Same:
    """The very tensor that goes in under another name."""

    name: str


@dataclass(frozen=True)
class Mask:
    """An attention mask in one of the forms that callers send.

    Args:
        form: `keys` [B, K] bool, `bool3` [B, 1, K] bool, `bool4` [B, 1, 1, K] bool, `bias`
            [B, 1, K] added, `bias_q` [B, Q, K] added, `bias_heads` [B*H, 1, K] added,
            `prefix` [B, K] bool with the padding last, `gaps` every other key, `ones` all keys.
        over: names of the inputs whose lengths add up to K; empty: the context's, else x's.
        batch: the mask's batch, where it differs from x's (PAG: the unperturbed part).
        heads: heads of the module, for `bias_heads`.
    """

    form: Form = "bias"
    over: tuple[str, ...] = ()
    batch: int = 0
    heads: int = 4


@dataclass(frozen=True)
class ImageMask:
    """A mask of numbers in [0, 1] over the picture, [1, images, height, width]."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pairs:
    """Cosines and sines [S, D] of neighbouring channels, as Flux, CogVideoX and Hunyuan send."""

    dim: int
    over: tuple[str, ...] = ("hidden_states",)


@dataclass(frozen=True)
class Halves:
    """Cosines and sines [S, D] whose second half repeats the first, as Stable Audio sends."""

    dim: int
    over: tuple[str, ...] = ("hidden_states",)


@dataclass(frozen=True)
class Turns:
    """Unit complex numbers [1, S, D/2] (Lumina); with `heads`, (cos, sin) [S, H, D/2] (Mochi)."""

    dim: int
    heads: int = 0
    over: tuple[str, ...] = ("hidden_states",)


@dataclass(frozen=True)
class Axes:
    """Allegro's tables: three (cos, sin) pairs and the three positions of every token."""

    dim: int
    sizes: tuple[int, int, int]


@dataclass(frozen=True)
class ModuleSpec:
    """An attention module: which kind, and its constructor's arguments."""

    kind: Literal["attention", "flux", "mochi", "multiscale"] = "attention"
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Case:
    """One configuration of one processor.

    Args:
        id: class and options, spelled out.
        cls: name of the processor class.
        init: the processor's constructor arguments.
        module: the attention module that it serves.
        inputs: specs of the call's keywords.
        setup: steps on the module before the call: `fuse`, `train`, `bare_out`.
        compare: against diffusers, or against the naive oracle where diffusers is wrong.
        grads: whether gradients are compared.
        tags: the options, for choosing.
    """

    id: str
    cls: str
    init: Mapping[str, Any]
    module: ModuleSpec
    inputs: Mapping[str, Any]
    setup: tuple[str, ...] = ()
    compare: Literal["diffusers", "naive"] = "diffusers"
    grads: bool = True
    tags: frozenset[str] = frozenset()


def draw(case: str, name: str, shape: tuple[int, ...], uniform: bool = False) -> Tensor:
    """Standard normal (or uniform in [0, 1]) float64 numbers that depend on the arguments only."""
    seed = zlib.crc32(f"{case}/{name}/{tuple(shape)}".encode())
    generator = torch.Generator().manual_seed(seed)
    make = torch.rand if uniform else torch.randn
    return make(shape, generator=generator, dtype=torch.float64)


def weight(case: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter or buffer: scales in [0.5, 1.5], small biases, matrices by their fan-in."""
    last = name.rsplit(".", 1)[-1]
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        return 0.5 + draw(case, name, shape, uniform=True)
    if len(shape) < 2:
        return 0.2 * draw(case, name, shape)
    return draw(case, name, shape) / math.sqrt(math.prod(shape[1:]))


def fill(case: Case, dtype: torch.dtype, rounded: torch.dtype) -> dict[str, Any]:
    """The call's keywords, made, rounded to `rounded` and then cast to `dtype`.

    Rotary tables and picture masks stay in fp32, as callers send them.
    """
    made: dict[str, Any] = {}
    for name, spec in case.inputs.items():
        fresh = _make(case.id, name, spec, made)
        made[name] = fresh if isinstance(spec, Same) else _cast(fresh, dtype, rounded)
    return made


def _cast(value: Any, dtype: torch.dtype, rounded: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype, rounded) for item in value)
    if not isinstance(value, Tensor) or value.dtype != torch.float64:
        return value
    return value.detach().to(rounded).to(dtype).requires_grad_(value.requires_grad)


def _make(case: str, name: str, spec: Any, made: Mapping[str, Any]) -> Any:
    if isinstance(spec, (tuple, list)):
        return type(spec)(_make(case, f"{name}.{i}", s, made) for i, s in enumerate(spec))
    if isinstance(spec, Normal):
        return draw(case, name, spec.shape).requires_grad_()
    if isinstance(spec, Same):
        return made[spec.name]
    if isinstance(spec, Mask):
        return _mask(case, spec, made)
    if isinstance(spec, ImageMask):
        return draw(case, name, spec.shape, uniform=True).float()
    if isinstance(spec, (Pairs, Halves, Turns, Axes)):
        return _rotary(case, name, spec, made)
    return spec


def tokens(x: Tensor) -> int:
    """How many tokens `x` has: [B, S, C] or [B, C, height, width]."""
    return x.shape[1] if x.ndim == 3 else math.prod(x.shape[2:])


def _span(over: tuple[str, ...], made: Mapping[str, Any]) -> int:
    names = over or ("encoder_hidden_states",)
    found = [made[name] for name in names if made.get(name) is not None]
    # Image prompts come behind the text, as (text, [image, ...]).
    found = [value[0] if isinstance(value, tuple) else value for value in found]
    return sum(map(tokens, found or [made["hidden_states"]]))


def _mask(case: str, spec: Mask, made: Mapping[str, Any]) -> Tensor:
    x, keys = made["hidden_states"], _span(spec.over, made)
    batch = spec.batch or x.shape[0]
    rows = {"bias_q": tokens(x), "bias_heads": spec.heads}.get(spec.form, 1)
    attend = draw(case, "mask", (batch, rows, keys), uniform=True) > 0.4
    if spec.form == "ones":
        attend = torch.ones_like(attend)
    if spec.form == "prefix":
        attend = torch.arange(keys) < 2 + torch.arange(batch)[:, None, None]
    if spec.form == "gaps":
        attend = (torch.arange(keys) % 2 == 0).repeat(batch, 1, 1)
    attend[..., 0] = True
    if spec.form in ("keys", "prefix", "gaps", "ones"):
        return attend[:, 0]
    if spec.form in ("bool3", "bool4"):
        return attend if spec.form == "bool3" else attend[:, None]
    bias = torch.where(attend, draw(case, "bias", tuple(attend.shape)), -10000.0)
    return bias.reshape(batch * rows, 1, keys) if spec.form == "bias_heads" else bias


def _rotary(case: str, name: str, spec: Any, made: Mapping[str, Any]) -> Any:
    if isinstance(spec, Axes):
        return _axes(case, name, spec)
    length = _span(spec.over, made)
    heads = getattr(spec, "heads", 0)
    angle = draw(case, name, (length, heads, spec.dim // 2) if heads else (length, spec.dim // 2))
    if isinstance(spec, Turns) and not heads:
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[None]
    if isinstance(spec, Pairs):
        angle = angle.repeat_interleave(2, dim=-1)
    if isinstance(spec, Halves):
        angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def _axes(case: str, name: str, spec: Axes) -> Any:
    def table(axis: int, size: int) -> tuple[Tensor, Tensor]:
        half = draw(case, f"{name}.{axis}", (size, spec.dim // 6))
        angle = torch.cat([half, half], dim=-1)
        return angle.cos().float(), angle.sin().float()

    grid = torch.meshgrid(*(torch.arange(size) for size in spec.sizes), indexing="ij")
    tables = tuple(table(axis, size) for axis, size in enumerate(spec.sizes))
    return tables, tuple(axis.flatten()[None] for axis in grid)
