"""Where a text stands that a model joined to the image before the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..types import KernelCall, Scoring

__all__ = ["TextBefore"]


@dataclass(frozen=True)
class TextBefore:
    """Tells the parts further in that the sequence begins with a text.

    The single-stream blocks of Flux get text and image as one sequence, so nothing in the call
    says where the image begins. Layers that join a text themselves know it and stay as they are.

    Args:
        tokens: How many tokens the text has.
    """

    tokens: int
    name: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, possible are numbers from 1 on")

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        if scoring.image is None and scoring.image_keys is None:
            if self.tokens >= min(q.shape[2], k.shape[2]):
                raise ValueError(
                    f"hidden_states has {q.shape[2]} tokens, of which the first {self.tokens} "
                    "are text: there is no image"
                )
            places = (self.tokens, q.shape[2]), (self.tokens, k.shape[2])
            scoring = scoring.but(image=places[0], image_keys=places[1])
        return kernel(q, k, v, scoring)
