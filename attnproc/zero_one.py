"""Float masks of zeros and ones, which mean "attend" to their makers and next to nothing added.

Whether a mask is one depends on its values. Looking at them is free of surprise on a CPU alone: on
other devices it would wait for the device, and compiled code can't. There it is done only where
the environment says ``ATTNPROC_CHECK_MASKS=1``, and never under `torch.compile`.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["refuse_zero_one"]

_EVERYWHERE = os.environ.get("ATTNPROC_CHECK_MASKS") == "1"
# So many rows of the batch and so many queries are looked at.
_SAMPLE = 32
# Masks that were found good, with the version that was looked at.
_GOOD = WeakTensorKeyDictionary()


def refuse_zero_one(mask: Tensor) -> None:
    """Refuses a float mask of zeros and ones; of ones alone it means the same either way.

    Raises:
        ValueError: It is such a mask.
    """
    if mask.dtype == torch.bool or torch.compiler.is_compiling():
        return
    if mask.requires_grad or not (_EVERYWHERE or mask.device.type == "cpu"):
        return
    version = 0 if mask.is_inference() else mask._version
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
