"""Image prompts by fused kernels, where they can stand in for the composed parts.

What the parts are decides: plain layers of one dtype, the automatic kernel, tensors on a GPU,
without gradients. Everything else goes the composed way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import AUTO
from .kernels.fusing import fusable
from .kernels.tuned import is_tuned
from .linears import is_watched
from .types import KernelCall, Scoring

__all__ = ["attended", "projected"]

Branch = tuple[Tensor, Tensor, "float | Tensor"]


def projected(
    layers: Sequence[tuple[Any, Any]], states: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values ``[rows, N]`` of states ``[..., C]`` of few rows, by one launch.

    None where no kernel can.
    """
    # Autocast would choose another dtype.
    if not states or not _takes(states[0]) or torch.is_autocast_enabled(states[0].device.type):
        return None
    from .kernels.triton.rows import MOST, ROWS, pairs_of_products

    if len(states) > MOST or any(not 0 < x.numel() <= ROWS * x.shape[-1] for x in states):
        return None
    pairs: list[Any] = []
    for (to_k, to_v), x in zip(layers, states, strict=True):
        k, v = _weights(to_k, x), _weights(to_v, x)
        if k is None or v is None or not x.is_contiguous():
            return None
        pairs.append((x, k[0], v[0], k[1], v[1]))
    if not _of_one_kind(pairs):
        return None
    return pairs_of_products(pairs)


def attended(
    branches: Sequence[Branch], q: Tensor, kernel: KernelCall, scoring: Scoring
) -> Tensor | None:
    """The weighted sum ``[B, S, H*D]`` of attention to each branch; None where no kernel can."""
    if not _takes(q) or isinstance(scoring.scale, Tensor):
        return None
    if kernel != AUTO or is_tuned(q.device.type):
        return None
    from .kernels.triton import branches as home

    return home.attended(q, branches, scoring.scale) if home.fits(q, branches) else None


def _takes(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return fusable(x)


def _weights(layer: Any, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that does nothing but its product; None for any other."""
    if layer.__class__ is not nn.Linear or is_watched(layer):
        return None
    # By the registry, as an attribute of a module takes five times as long.
    weight, bias = layer._parameters.get("weight"), layer._parameters["bias"]
    for held in (weight,) if bias is None else (weight, bias):
        if type(held) not in (Tensor, nn.Parameter) or not _alike(held, like):
            return None
    return (weight, bias) if weight.is_contiguous() else None


def _of_one_kind(pairs: list[Any]) -> bool:
    """Whether inputs and weights have one width each, and all biases are there or none."""
    first, weight, _, bias, _ = pairs[0]
    return all(
        x.shape[-1] == weight.shape[1]
        and k.shape == v.shape == weight.shape
        and (a is None) == (b is None) == (bias is None)
        and _alike(x, first)
        for x, k, v, a, b in pairs
    )


def _alike(x: Tensor, like: Tensor) -> bool:
    return x.dtype is like.dtype and x.get_device() == like.get_device()
