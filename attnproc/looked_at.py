"""What depends on the values of a mask: they are looked at once a mask, not once a layer.

Compiled code can't look at values, nor can a CUDA graph while it is recorded; there a mask is
taken as it is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["hides_nothing", "refuse_zero_one"]

# Looking for float masks of zeros and ones waits for the device; only an error depends on it.
_EVERYWHERE = os.environ.get("ATTNPROC_CHECK_MASKS") == "1"
# So many rows of the batch and so many queries are looked at.
_SAMPLE = 32
# Under torch.func a mask may have no values of its own.
_TORCH: Any = torch
# Masks that were looked at: their version then, and what was found.
_GOOD = WeakTensorKeyDictionary()
_WHOLE = WeakTensorKeyDictionary()


def refuse_zero_one(mask: Tensor) -> None:
    """Refuses a float mask of zeros and ones, which mean "attend" to their makers.

    Added to the scores they would hide next to nothing. Of ones alone it means the same either
    way. Looked at on a CPU, elsewhere only where the environment says ``ATTNPROC_CHECK_MASKS=1``.

    Raises:
        ValueError: It is such a mask.
    """
    if mask.dtype == torch.bool or torch.compiler.is_compiling():
        return
    if mask.requires_grad or not (_EVERYWHERE or mask.is_cpu):
        return
    version = _version(mask)
    if _GOOD.get(mask) == version:
        return
    values = mask[:_SAMPLE] if mask.ndim < 3 else mask[:_SAMPLE, ..., :_SAMPLE, :]
    ones, zeros = values == 1, values == 0
    if ones.any() and zeros.any() and (ones | zeros).all():
        raise ValueError(
            "attention_mask is a float mask of zeros and ones: float masks are added to the "
            "scores, so it would hide nothing. Give mask.bool() (true means attend), or "
            "(1 - mask) * -10000 if it is to be added"
        )
    _GOOD[mask] = version


def hides_nothing(mask: Tensor) -> bool:
    """Whether a mask of what may be attended to is true, or not zero, all over."""
    if torch.compiler.is_compiling() or type(mask) is not Tensor:
        return False
    if mask.is_inference():
        # It has no version that would tell of a change.
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    if _TORCH._C._are_functorch_transforms_active():
        return False
    version, known = mask._version, _WHOLE.get(mask)
    if known is None or known[0] != version:
        known = _WHOLE[mask] = version, bool(mask.all())
    return known[1]


def _version(mask: Tensor) -> int:
    return 0 if mask.is_inference() else mask._version
