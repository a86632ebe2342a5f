"""The factor of the scores."""

from __future__ import annotations

import math

from torch import Tensor

from .types import Site

__all__ = ["module_scale", "proportional"]


def module_scale(at: Site) -> float | Tensor | None:
    """The module's `scale`; None, so ``D ** -0.5``, where it has none."""
    return at.setting("scale", None)


def proportional(at: Site) -> float | Tensor | None:
    """The module's scale times ``sqrt(log(S) / log(base_length))`` where keys are rotated.

    It keeps the entropy of attention at other sequence lengths than trained (Lumina).
    Source: https://arxiv.org/abs/2306.08645
    """
    scale, call = module_scale(at), at.call
    if call.key_rope is None or call.base_length is None or scale is None:
        return scale
    length = math.prod(call.x.shape[2:]) if call.x.ndim == 4 else call.x.shape[1]
    return math.sqrt(math.log(length, call.base_length)) * scale
