"""The two sides of a row: our processor and diffusers', on one module with one set of weights.

Before anything is timed the sides must agree, in outputs and, where it runs, in gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rows import Row, make
from torch import Tensor, nn

import attnproc
from attnproc.verify.references import reference

__all__ = ["SIDES", "Disagreement", "Pair", "difference", "pair"]

SIDES = ("ours", "diffusers")
# Outputs and gradients, relative to their size: a few roundings of the dtype.
TOLERANCES = {
    torch.float32: (1e-4, 1e-3),
    torch.float16: (5e-3, 2e-2),
    torch.bfloat16: (2e-2, 5e-2),
}
# Inputs that a training step has no gradients for.
_FIXED = ("rotary", "mask", "sequence_length")


class Disagreement(Exception):
    """The two sides don't compute the same."""


@dataclass
class Pair:
    """A row made ready on a device, for both sides."""

    row: Row
    attn: nn.Module
    inputs: dict[str, Any]
    processors: dict[str, Any]
    device: str
    dtype: torch.dtype
    beside: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def call(self, side: str) -> Callable[[], Any]:
        """One forward pass."""
        processor, attn, inputs = self.processors[side], self.attn, self.inputs
        return lambda: processor(attn, **inputs)

    def step(self, side: str) -> Callable[[], tuple[Tensor | None, ...]]:
        """One forward and backward pass: the gradients of all inputs and weights."""
        leaves, inputs = _leaves(self.inputs)
        processor, attn = self.processors[side], self.attn
        wanted = (*leaves, *_weights(self).values())
        with torch.enable_grad():
            likes = _flat(processor(attn, **inputs))
        cotangents = tuple(_noise(like) for like in likes)
        del likes

        def step() -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                outs = _flat(processor(attn, **inputs))
                return torch.autograd.grad(outs, wanted, cotangents, allow_unused=True)

        return step

    def agree(self) -> float:
        """The difference of the outputs.

        Raises:
            Disagreement: It is larger than roundings make it.
        """
        ours, theirs = (_flat(self.call(side)()) for side in SIDES)
        if len(ours) != len(theirs):
            raise Disagreement(f"{len(ours)} outputs, diffusers has {len(theirs)}")
        found = max(map(difference, ours, theirs), key=_nan_first)
        return _within(found, TOLERANCES[self.dtype][0], "outputs")

    def gradients_agree(self) -> float:
        """The difference of the gradients.

        Some are zero but for rounding (a key's bias), so each counts relative to a tenth of the
        largest of its kind at least: of biases, of matrices, of inputs.

        Raises:
            Disagreement: It is larger than roundings make it, or one side lacks a gradient.
        """
        ours, theirs = (self.step(side)() for side in SIDES)
        if [g is None for g in ours] != [g is None for g in theirs]:
            raise Disagreement("one side has gradients that the other has not")
        both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None]
        tops: dict[int, float] = {}
        for _, b in both:
            tops[b.ndim] = max(tops.get(b.ndim, 0.0), _size(b))
        errors = [
            _size(a.float() - b.float()) / max(_size(b), 0.1 * tops[b.ndim]) for a, b in both
        ]
        found = max(errors, key=_nan_first)
        return _within(found, TOLERANCES[self.dtype][1], "gradients")


def pair(row: Row, device: str, dtype: torch.dtype, shrink: int = 1) -> Pair:
    """Builds a row for both sides; adapters of ours take the weights of diffusers'."""
    setting = make(row, device, dtype, shrink)
    row = setting.row
    theirs = reference(row.cls, row.init)
    if isinstance(theirs, nn.Module):
        theirs.to(device, dtype)
        with torch.device("meta"):
            ours = getattr(attnproc, row.cls)(**row.init)
        ours.__dict__["_modules"] = dict(theirs.named_children())
    else:
        ours = getattr(attnproc, row.cls)(**row.init)
    both = {"ours": ours, "diffusers": theirs}
    return Pair(row, setting.attn, setting.inputs, both, device, dtype)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference, relative to the norm; NaN stays NaN."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-6)).item()


def _nan_first(error: float) -> tuple[bool, float]:
    return math.isnan(error), error


def _within(found: float, allowed: float, what: str) -> float:
    if not found <= allowed:
        raise Disagreement(f"the {what} differ by {found:.1e}, allowed are {allowed:.0e}")
    return found


def _weights(both: Pair) -> dict[str, nn.Parameter]:
    found = {f"attn.{name}": p for name, p in both.attn.named_parameters()}
    theirs = both.processors["diffusers"]
    if isinstance(theirs, nn.Module):
        found |= {f"processor.{name}": p for name, p in theirs.named_parameters()}
    return found


def _leaves(inputs: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Inputs that ask for gradients, and the call's arguments made of them."""
    made: dict[int, Tensor] = {}

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            # What is one tensor in the call is one leaf.
            return made.setdefault(id(x), x.detach().clone().requires_grad_())
        if isinstance(x, list | tuple):
            return type(x)(map(leaf, x))
        return x

    changed = {
        name: x if any(part in name for part in _FIXED) else leaf(x) for name, x in inputs.items()
    }
    return list(made.values()), changed


def _noise(like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.empty_like(like).normal_(generator=generator)


def _size(x: Tensor) -> float:
    """Root mean square."""
    return x.float().square().mean().sqrt().item()


def _flat(out: Any) -> tuple[Tensor, ...]:
    return tuple(_tensors(out))


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif out is not None:
        for part in out:
            yield from _tensors(part)
