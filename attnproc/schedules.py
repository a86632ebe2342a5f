"""Weights of adapters: numbers, tensors, one an image, or a function of the step.

A weight that changes while a model is compiled must be a tensor or a `Schedule`; neither causes a
new compilation. A plain zero does no work; a tensor is never looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Clock", "Schedule", "Weight", "amount", "is_off"]


class Clock:
    """How far a denoising process is: 0 at its first step, 1 at its end.

    Attributes:
        fraction: The time as a number.
        tensor: The same as a float32 tensor without dimensions, for compiled models.
    """

    def __init__(self) -> None:
        self.fraction = 0.0
        self.tensor = torch.zeros(())

    def set(self, fraction: float) -> None:
        """Sets the time.

        Raises:
            ValueError: `fraction` is not in [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is {fraction}, possible are numbers from 0 to 1")
        self.fraction = fraction
        self.tensor.fill_(fraction)

    def on_step_end(
        self, pipeline: Any, step: int, timestep: Any, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """A pipeline's `callback_on_step_end`: moves on by a step; to 0 after the last."""
        steps = len(pipeline.scheduler.timesteps)
        self.set(0.0 if step + 1 >= steps else (step + 1) / steps)
        return inputs


@dataclass(frozen=True, eq=False)
class Schedule:
    """A weight that depends on the step.

    Args:
        clock: The time; a model's comes from `attnproc.on(model).clock`.
        weight: The weight between `begin` and `end`; it is zero outside.
        begin: Fraction of the steps from which on it holds.
        end: Fraction of the steps from which on it does not hold any more.
        shape: A further factor as a function of the time, for numbers and tensors alike.
    """

    clock: Clock
    weight: float = 1.0
    begin: float = 0.0
    end: float = 1.0
    shape: Callable[[float | Tensor], float | Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(
                f"begin and end are {self.begin} and {self.end}, possible are fractions with "
                "0 <= begin <= end <= 1"
            )

    def now(self) -> float | Tensor:
        """The weight at the clock's time: a tensor while compiling, a number otherwise."""
        if not torch.compiler.is_compiling():
            return self._at(self.clock.fraction)
        time = self.clock.tensor
        inside = (time >= self.begin) & ((time < self.end) | (self.end == 1))
        return inside * self._weighted(time)

    def _at(self, time: float) -> float | Tensor:
        inside = self.begin <= time and (time < self.end or self.end == 1)
        return self._weighted(time) if inside else 0.0

    def _weighted(self, time: float | Tensor) -> float | Tensor:
        return self.weight if self.shape is None else self.weight * self.shape(time)


Weight = float | Tensor | Schedule | Sequence["float | Tensor | Schedule"]


def amount(weight: float | Tensor | Schedule) -> float | Tensor:
    """A weight as a factor of ``[B, S, C]``; a tensor ``[B]`` is one an image."""
    if isinstance(weight, Schedule):
        return weight.now()
    if isinstance(weight, Tensor) and weight.ndim == 1:
        return weight[:, None, None]
    return weight


def is_off(weight: Weight) -> bool:
    """Whether a weight is zero by its plain numbers."""
    if isinstance(weight, list | tuple):
        return all(is_off(w) for w in weight)
    if isinstance(weight, Schedule):
        weight = weight.now()
    return not isinstance(weight, Tensor) and weight == 0
