"""Norm layers and small modules with diffusers' arguments, state keys and numerics.

They let `attnproc.attention` stand without diffusers. In half and single precision each layer
computes what its namesake in diffusers 0.42.1 computes; in double precision statistics stay in
double, where diffusers drops to single.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "FP32LayerNorm",
    "LpNorm",
    "MochiRMSNorm",
    "QKNorm",
    "RMSNorm",
    "SanaMultiscaleAttentionProjection",
    "SpatialNorm",
    "check_divides",
    "check_one_of",
    "check_positive",
    "normalization",
]

_SPATIAL_GROUPS = 32


def check_one_of(name: str, value: object, possible: Sequence[object]) -> None:
    """Raises a ValueError unless `value`, given as `name`, is one of `possible`."""
    if value not in possible:
        choices = ", ".join(map(repr, possible))
        raise ValueError(f"{name}: got {value!r}, possible are {choices}")


def check_positive(**sizes: object) -> None:
    """Raises a ValueError unless each size is a whole number above zero, or None."""
    for name, size in sizes.items():
        if size is not None and not (isinstance(size, int) and size > 0):
            raise ValueError(f"{name}: got {size!r}, need a whole number above 0")


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raises a ValueError unless `value`, given as `name`, divides `whole`."""
    check_positive(**{name: value})
    if whole % value:
        raise ValueError(f"{name}: got {value}, need a divisor of {whole_name}, which is {whole}")


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension (https://arxiv.org/abs/1910.07467).

    The mean is taken in fp32. A half-precision weight is applied in half precision; an fp32
    weight makes the output fp32, as in diffusers.

    Args:
        dim: size of the last dimension, or the shape of the weight.
        eps: added to the mean square.
        elementwise_affine: learn a weight.
        bias: with `elementwise_affine`, learn a bias too.
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        eps: float,
        elementwise_affine: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.dim = torch.Size((dim,) if isinstance(dim, int) else dim)
        affine, shifted = elementwise_affine, elementwise_affine and bias
        self.weight = nn.Parameter(torch.ones(self.dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(self.dim)) if shifted else None

    def _normalized(self, hidden_states: Tensor) -> Tensor:
        variance = _at_least_single(hidden_states).square().mean(-1, keepdim=True)
        return hidden_states * torch.rsqrt(variance + self.eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes `hidden_states`, [..., D]."""
        normalized = self._normalized(hidden_states)
        if self.weight is None:
            return normalized.to(hidden_states.dtype)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            normalized = normalized.to(self.weight.dtype)
        normalized = normalized * self.weight
        return normalized if self.bias is None else normalized + self.bias

    def extra_repr(self) -> str:
        return f"{tuple(self.dim)}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class MochiRMSNorm(RMSNorm):
    """RMS norm as Mochi has it: weighted in fp32, returned in the dtype that came.

    Args:
        dim: size of the last dimension, or the shape of the weight.
        eps: added to the mean square.
        elementwise_affine: learn a weight.
    """

    def __init__(
        self, dim: int | Sequence[int], eps: float, elementwise_affine: bool = True
    ) -> None:
        super().__init__(dim, eps, elementwise_affine)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes `hidden_states`, [..., D]."""
        normalized = self._normalized(hidden_states)
        if self.weight is not None:
            normalized = normalized * self.weight
        return normalized.to(hidden_states.dtype)


class FP32LayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32, whatever dtype comes; returned in that dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes `input`, [..., D]."""
        weight, bias = cast("Tensor | None", self.weight), cast("Tensor | None", self.bias)
        wide = _at_least_single(input)
        normalized = F.layer_norm(
            wide,
            self.normalized_shape,
            None if weight is None else weight.to(wide.dtype),
            None if bias is None else bias.to(wide.dtype),
            self.eps,
        )
        return normalized.to(input.dtype)


class LpNorm(nn.Module):
    """Division by the p-norm along one dimension, without weights.

    Args:
        p: order of the norm.
        dim: dimension along which it is taken.
        eps: least value of the divisor.
    """

    def __init__(self, p: int = 2, dim: int = -1, eps: float = 1e-12) -> None:
        super().__init__()
        self.p = p
        self.dim = dim
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes `hidden_states` along `dim`."""
        return F.normalize(hidden_states, p=self.p, dim=self.dim, eps=self.eps)

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}, eps={self.eps}"


@dataclass(frozen=True)
class QKNorm:
    """How an attention module norms queries and keys, and the layers for it.

    Args:
        kind: one of `KINDS`.
        dim_head: channels of a head.
        heads: number of query heads.
        kv_heads: number of key heads.
        eps: of the norms.
        affine: norms within each head have weights, where the kind has any.
    """

    KINDS: ClassVar = (
        None,
        "layer_norm",
        "fp32_layer_norm",
        "layer_norm_across_heads",
        "rms_norm",
        "rms_norm_across_heads",
        "l2",
    )
    # Without "layer_norm_across_heads" and "l2", which no second stream has.
    CONTEXT_KINDS: ClassVar = (*KINDS[:3], *KINDS[4:6])

    kind: str | None
    dim_head: int
    heads: int
    kv_heads: int
    eps: float
    affine: bool

    def pair(self) -> tuple[nn.Module | None, nn.Module | None]:
        """New layers for queries and for keys; None without a norm."""
        return self._layer(self.heads), self._layer(self.kv_heads)

    def _layer(self, heads: int) -> nn.Module | None:
        each, across = self.dim_head, self.dim_head * heads
        match self.kind:
            case "layer_norm":
                return nn.LayerNorm(each, self.eps, self.affine)
            case "fp32_layer_norm":
                return FP32LayerNorm(each, self.eps, elementwise_affine=False)
            case "layer_norm_across_heads":
                return nn.LayerNorm(across, self.eps)
            case "rms_norm":
                return RMSNorm(each, self.eps, self.affine)
            case "rms_norm_across_heads":
                return RMSNorm(across, self.eps)
            case "l2":
                return LpNorm(eps=self.eps)
            case _:
                return None


class SpatialNorm(nn.Module):
    """Group norm scaled and shifted at each place by a map (https://arxiv.org/abs/2209.09002).

    Args:
        f_channels: channels of what is normalized, a multiple of 32.
        zq_channels: channels of the map.
    """

    def __init__(self, f_channels: int, zq_channels: int) -> None:
        super().__init__()
        check_positive(f_channels=f_channels, zq_channels=zq_channels)
        if f_channels % _SPATIAL_GROUPS:
            raise ValueError(f"f_channels: got {f_channels}, need a multiple of {_SPATIAL_GROUPS}")
        self.norm_layer = nn.GroupNorm(_SPATIAL_GROUPS, f_channels, eps=1e-6)
        self.conv_y = nn.Conv2d(zq_channels, f_channels, kernel_size=1)
        self.conv_b = nn.Conv2d(zq_channels, f_channels, kernel_size=1)

    def forward(self, f: Tensor, zq: Tensor) -> Tensor:
        """Normalizes `f`, [B, F, H, W], by `zq`, [B, Z, h, w], brought to its size."""
        zq = F.interpolate(zq, size=f.shape[-2:], mode="nearest")
        return self.norm_layer(f) * self.conv_y(zq) + self.conv_b(zq)


class SanaMultiscaleAttentionProjection(nn.Module):
    """Mixes q, k and v with their neighbours at one scale: depth-wise, then within each head.

    Args:
        in_channels: channels of each of q, k and v.
        num_attention_heads: heads of each; divides `in_channels`.
        kernel_size: odd width of the neighbourhood.
    """

    def __init__(self, in_channels: int, num_attention_heads: int, kernel_size: int) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, kernel_size=kernel_size)
        check_divides("num_attention_heads", num_attention_heads, "in_channels", in_channels)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, need an odd number")
        width, heads = 3 * in_channels, 3 * num_attention_heads
        self.proj_in = nn.Conv2d(
            width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=False
        )
        self.proj_out = nn.Conv2d(width, width, 1, groups=heads, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Projects `hidden_states`, [B, 3C, H, W], to the same shape."""
        return self.proj_out(self.proj_in(hidden_states))


def normalization(norm_type: str, num_features: int) -> nn.Module:
    """The norm layer of that name over `num_features`, as DC-AE names them.

    Args:
        norm_type: `"rms_norm"` (with a bias), `"layer_norm"` or `"batch_norm"`.
        num_features: number of channels.
    """
    check_one_of("norm_type", norm_type, ("rms_norm", "layer_norm", "batch_norm"))
    check_positive(num_features=num_features)
    if norm_type == "rms_norm":
        return RMSNorm(num_features, eps=1e-5, bias=True)
    if norm_type == "layer_norm":
        return nn.LayerNorm(num_features)
    return nn.BatchNorm2d(num_features)
