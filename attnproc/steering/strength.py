"""How strongly a part acts: a number, a tensor, or a schedule over the steps."""

from __future__ import annotations

from torch import Tensor

from ..schedules import Schedule

__all__ = ["Strength", "mixed", "now"]

Strength = float | Tensor | Schedule


def now(strength: Strength) -> float | Tensor:
    """The strength at this step; a plain 0 means that the part does nothing."""
    return strength.now() if isinstance(strength, Schedule) else strength


def mixed(plain: Tensor, steered: Tensor, strength: float | Tensor) -> Tensor:
    """From the plain result at 0 to the steered one at 1."""
    return plain + strength * (steered - plain)
