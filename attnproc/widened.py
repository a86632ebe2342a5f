"""Products in half precision on a CPU without instructions for it.

There torch multiplies element by element, at a tenth of the speed of float32. In float32, block by
block, the sums are as exact and are rounded once, as torch rounds them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .kernels.fusing import alike, is_transformed, keeps_nothing
from .kernels.takes import HALF

__all__ = ["is_slow", "widened"]

# Fewer tokens than this take less time than making the weight wide does.
_FEWEST = 16
# Of a block's tokens and channels: the fewest that multiply fast, the most that are held wide.
_LEAST, _MOST = 32, 256


def is_slow(x: Tensor, weight: Any) -> bool:
    """Whether a product of `x` ``[..., C]`` takes less time in float32, keeping nothing."""
    if x.dtype not in HALF or not x.is_cpu or x.numel() < _FEWEST * x.shape[-1]:
        return False
    plain = alike(weight, x) and x.__class__ is Tensor and keeps_nothing()
    return plain and _lacks(x.dtype) and not (is_transformed() or torch.is_autocast_enabled("cpu"))


@functools.cache
def _lacks(dtype: torch.dtype) -> bool:
    """Whether this CPU lacks products of that dtype, as torch itself asks it."""
    # Measured on AVX2; older and other processors are left to torch.
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    ops: Any = torch.ops.mkldnn
    bf16 = dtype is torch.bfloat16
    return not (ops._is_mkldnn_bf16_supported() if bf16 else ops._is_mkldnn_fp16_supported())


def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in float32, rounded to the dtype of `x` ``[..., C]``."""
    tokens = x.flatten(0, -2)
    out = x.new_empty(tokens.shape[0], weight.shape[0])
    # What is wide takes no more than the result, so it does not set the peak of memory.
    few = tokens.shape[0] < 2 * _LEAST
    step = tokens.shape[0] if few else min(tokens.shape[0] // 2 // _LEAST * _LEAST, _MOST)
    for some, into in zip(tokens.split(step), out.split(step), strict=True):
        _fill(into, some.float(), weight, bias, max(step // 2, _LEAST))
    return out.unflatten(0, x.shape[:-1])


def _fill(into: Tensor, wide: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> None:
    """Writes the product, some channels at a time."""
    for start in range(0, weight.shape[0], step):
        some = slice(start, start + step)
        if bias is None:
            into[:, some] = wide @ weight[some].float().t()
        else:
            into[:, some] = torch.addmm(bias[some].float(), wide, weight[some].float().t())
