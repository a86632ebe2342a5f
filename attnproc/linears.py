"""What a named projection computes: the module's layer, or an adapter's in its place or on top.

The parts of `Recipe.linears` are called in order with what the earlier ones gave (None at first, a
slice of a packed product where the layout made one). A part that replaces stands before
`module_linear`, one that adds after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import ModuleList
from torch.nn.modules import module

from .schedules import amount, is_off
from .types import Site
from .widened import is_slow, widened

__all__ = [
    "PROJECTIONS",
    "CustomDiffusion",
    "LoRA",
    "LoRALinear",
    "called",
    "dropout",
    "is_watched",
    "module_linear",
    "mount_custom_diffusion",
    "mount_lora",
    "widths",
]


PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


# Above so many launches, or below so many tokens, a copy takes less time: a product of fewer rows
# is over before the CPU has launched the next one.
_ROWS, _TOKENS = 4, 2048


def module_linear(at: Site, name: str, x: Tensor, y: Tensor | None) -> Tensor:
    """The attention module's own layer."""
    if y is not None:
        return y
    layer = at.held(name)
    if layer is None:
        # The module says by name what it has not got.
        layer = getattr(at.attn, name)
    if layer.__class__ is ModuleList:
        layer = layer._modules["0"]
    return called(layer, x, at.compiling)


def called(layer: Any, x: Tensor, compiling: bool) -> Tensor:
    """``layer(x)``, for a plain linear layer without the cost of `Module.__call__`.

    That would be as much as a launch; hooks are honoured. Compiled code has no such cost, but a
    guard for whatever is looked at.
    """
    if compiling:
        # Of a stream of a joint sequence torch makes a copy anyway, but adds the bias in a pass of
        # its own where it does so by itself.
        return layer(x.contiguous())
    if layer.__class__ is not nn.Linear or is_watched(layer):
        return layer(x)
    own = layer._parameters
    weight = own.get("weight")
    if weight is None:
        # Sharded training holds it as an attribute.
        return layer(x)
    bias = own["bias"]
    if not x.is_cuda and is_slow(x, weight):
        return widened(x, weight, bias)
    return F.linear(x, weight, bias) if x.is_contiguous() else _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, of tokens that stand apart (a stream of a joint sequence) too.

    Those torch would copy together, and add the bias in a pass of its own.
    """
    if x.ndim != 3:
        return F.linear(x, weight, bias)
    if not _goes_by_rows(x, weight):
        return F.linear(x.contiguous(), weight, bias)
    out = x.new_empty(*x.shape[:2], weight.shape[0])
    for one, into in zip(x, out, strict=True):
        if bias is None:
            torch.mm(one, weight.t(), out=into)
        else:
            torch.addmm(bias, one, weight.t(), out=into)
    return out


def _goes_by_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether a product for each row of the batch takes less time than a copy of the input."""
    plain = x.__class__ is Tensor and weight.__class__ is nn.Parameter and x.dtype == weight.dtype
    long = x.is_cuda and x.stride(2) == 1 and x.shape[0] <= _ROWS and x.shape[1] >= _TOKENS
    return plain and long and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))


# Hooks of all modules: torch changes these in place.
_MODULE: Any = module
_FORWARD: Any = _MODULE._global_forward_hooks
_FORWARD_PRE: Any = _MODULE._global_forward_pre_hooks
_BACKWARD: Any = _MODULE._global_backward_hooks
_BACKWARD_PRE: Any = _MODULE._global_backward_pre_hooks


def is_watched(layer: Any) -> bool:
    """Whether anything but `forward` happens where a layer is called."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or _FORWARD
        or _FORWARD_PRE
        or _BACKWARD
        or _BACKWARD_PRE
    )


def dropout(at: Site, layers: Any, x: Tensor) -> Tensor:
    """The dropout that comes with the output projection in use, `layers` or an adapter's."""
    if at.recipe.linears[0] is not module_linear:
        own = at.mounted("to_out_custom_diffusion")
        layers = layers if own is None else own
    drop: Any = layers._modules.get("1")
    if drop is None:
        return x
    if at.compiling:
        return drop(x)
    # Looked at before it is called, since most have nothing to drop.
    idle = type(drop) is nn.Dropout and not (drop.training and drop.p) and not is_watched(drop)
    return x if idle else drop(x)


class LoRALinear(nn.Module):
    """Low-rank update ``(alpha / rank) up(down(x))`` of a linear layer; `up` is zero at first.

    Args:
        in_features: Width of the layer's input.
        out_features: Width of its output.
        rank: Width between `down` and `up`.
        network_alpha: Numerator of the factor; None means `rank`, so a factor of 1.

    Source: https://arxiv.org/abs/2106.09685
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 4,
        network_alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.rank = rank
        self.network_alpha = network_alpha
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Computes in the dtype of the weights and returns that of `x` ``[..., in_features]``."""
        compiling = is_compiling()
        low = called(self.down, x.to(self.down.weight.dtype), compiling)
        y = called(self.up, low, compiling).to(x.dtype)
        return y if self.network_alpha is None else y * (self.network_alpha / self.rank)


@dataclass(frozen=True)
class LoRA:
    """Adds the low-rank updates that the processor holds as ``{projection}_{suffix}``.

    Their weight is the processor's `lora_weights[name]`, or 1.

    Args:
        name: Tells updates of one processor apart; the suffix is ``{name}_lora``, for the name
            "lora" that alone.
    """

    name: str = "lora"

    @property
    def suffix(self) -> str:
        """What the updates' names end in."""
        return "lora" if self.name == "lora" else f"{self.name}_lora"

    def __call__(self, at: Site, name: str, x: Tensor, y: Tensor | None) -> Tensor | None:
        update: Any = at.mounted(f"{name}_{self.suffix}")
        weight: Any = at.proc.lora_weights.get(self.name, 1.0)
        if update is None or is_off(weight) or is_off(at.call.lora_scale):
            return y
        return y + amount(weight) * at.call.lora_scale * update(x)


def mount_lora(
    proc: Any,
    sizes: dict[str, tuple[int, int]],
    rank: int,
    network_alpha: float | None,
    name: str = "lora",
) -> None:
    """Gives `proc` a low-rank update for each projection of `sizes` (input and output width)."""
    for projection, (wide, out) in sizes.items():
        update = LoRALinear(wide, out, rank, network_alpha)
        setattr(proc, f"{projection}_{LoRA(name).suffix}", update)


def widths(attn: Any, projections: Iterable[str] = PROJECTIONS) -> dict[str, tuple[int, int]]:
    """Input and output width of those projections that an attention module has."""
    found = {}
    for name in projections:
        layer: Any = getattr(attn, name, None)
        layer = layer[0] if isinstance(layer, ModuleList) else layer
        if hasattr(layer, "in_features"):
            found[name] = (layer.in_features, layer.out_features)
    return found


@dataclass(frozen=True)
class CustomDiffusion:
    """Replaces the projections for which the processor holds ``{projection}_custom_diffusion``.

    Source: https://arxiv.org/abs/2212.04488
    """

    name: ClassVar[str] = "custom_diffusion"

    def __call__(self, at: Site, name: str, x: Tensor, y: Tensor | None) -> Tensor | None:
        layer: Any = at.mounted(f"{name}_custom_diffusion")
        if layer is None:
            return y
        if layer.__class__ is ModuleList:
            return called(layer._modules["0"], x, at.compiling)
        dtype = layer.weight.dtype
        y = called(layer, x if x.dtype is dtype else x.to(dtype), at.compiling)
        dtype = at.held("to_q").weight.dtype
        return y if y.dtype is dtype else y.to(dtype)


def mount_custom_diffusion(
    proc: Any, sizes: dict[str, tuple[int, int]], out_bias: bool, dropout: float
) -> None:
    """Gives `proc` the projections that its `train_kv` and `train_q_out` name.

    Args:
        proc: The processor.
        sizes: Input and output width of `to_q`, `to_k`, `to_v` and `to_out`.
        out_bias: Whether the output projection has a bias.
        dropout: Probability of the dropout after it.
    """
    if proc.train_kv:
        proc.to_k_custom_diffusion = nn.Linear(*sizes["to_k"], bias=False)
        proc.to_v_custom_diffusion = nn.Linear(*sizes["to_v"], bias=False)
    if proc.train_q_out:
        proc.to_q_custom_diffusion = nn.Linear(*sizes["to_q"], bias=False)
    if proc.train_q_out and "to_out" in sizes:
        out = nn.Linear(*sizes["to_out"], bias=out_bias)
        proc.to_out_custom_diffusion = ModuleList([out, nn.Dropout(dropout)])
