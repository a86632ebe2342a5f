"""Norms of queries and keys: which of the module's layers norm what, and their formulas.

Whether a norm spans one head or all of them is read off the norm itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .types import QKV, Site, Streams

__all__ = [
    "Formula",
    "Norms",
    "apply",
    "each_its_own",
    "formula",
    "one_for_both",
    "unnormed",
]


@dataclass(slots=True)
class Norms:
    """The layers that norm queries and keys of the image and of the text; None where none does."""

    image: tuple[Any, Any] = (None, None)
    text: tuple[Any, Any] = (None, None)

    @property
    def none(self) -> bool:
        """Whether nothing is normed."""
        (q, k), (text_q, text_k) = self.image, self.text
        return q is None and k is None and text_q is None and text_k is None

    def over(self, streams: Streams) -> None:
        """Norms streams ``[B, S, H, D]``, each tensor over ``D`` or over ``H*D``."""
        self._over(self.image, streams.image)
        if streams.text is not None:
            self._over(self.text, streams.text)

    def _over(self, norms: tuple[Any, Any], stream: QKV) -> None:
        of_q, of_k = norms
        if of_q is not None:
            stream.q = apply(of_q, stream.q)
        if of_k is not None:
            stream.k = apply(of_k, stream.k)


def each_its_own(at: Site, text: bool) -> Norms:
    """`norm_q`, `norm_k` for the image; `norm_added_q`, `norm_added_k` for the text."""
    image = at.held("norm_q"), at.held("norm_k")
    if not text:
        return Norms(image, (None, None))
    return Norms(image, (at.held("norm_added_q"), at.held("norm_added_k")))


def one_for_both(at: Site, text: bool) -> Norms:
    """`norm_q`, `norm_k` for image and text."""
    image = at.held("norm_q"), at.held("norm_k")
    return Norms(image, image if text else (None, None))


def unnormed(at: Site, text: bool) -> Norms:
    """No norm."""
    return Norms((None, None), (None, None))


def apply(norm: nn.Module, x: Tensor | None) -> Tensor | None:
    """The norm of ``[B, S, H, D]``, over ``D`` or over ``H*D``."""
    if x is None:
        return x
    heads, dim = x.shape[2:]
    if heads > 1 and _width(norm) == heads * dim:
        return norm(x.flatten(2)).unflatten(2, (heads, dim))
    return norm(x)


def _width(norm: nn.Module) -> int | None:
    """Channels that the norm spans; None for one that takes any number."""
    # A module that is asked for what it has not got takes as long as a launch to say so.
    facts = norm.__dict__
    shape = facts.get("normalized_shape") or facts.get("dim")
    return shape[0] if isinstance(shape, tuple) else None


class Formula(NamedTuple):
    """A norm as numbers, for kernels that compute it themselves.

    Args:
        kind: "rms" (root mean square), "layer" or "l2".
        weight: Factor of each channel, or None.
        bias: Summand of each channel, or None.
        eps: What guards the division.
        across: Whether it spans all heads.
    """

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    across: bool

    @property
    def number(self) -> int:
        """What kernels call its kind; no norm is 0."""
        return ("", "rms", "layer", "l2").index(self.kind)


_KINDS = {
    "torch.nn.modules.normalization.LayerNorm": "layer",
    "torch.nn.modules.normalization.RMSNorm": "rms",
    "diffusers.models.normalization.FP32LayerNorm": "layer",
    "diffusers.models.normalization.RMSNorm": "rms",
    "diffusers.models.normalization.MochiRMSNorm": "rms",
    "diffusers.models.normalization.LpNorm": "l2",
    "attnproc.modules.FP32LayerNorm": "layer",
    "attnproc.modules.RMSNorm": "rms",
    "attnproc.modules.MochiRMSNorm": "rms",
    "attnproc.modules.LpNorm": "l2",
}


def formula(norm: Any, heads: int, dim: int, dtype: torch.dtype) -> Formula | None:
    """The formula of a norm of ``[B, S, heads, dim]``; None for any that is not known through.

    A layer with hooks, a changed `forward` or weights of a kind of their own is not: whoever
    changed it wants it called.
    """
    form = norm.__class__
    kind = _KINDS.get(f"{form.__module__}.{form.__qualname__}")
    if kind is None or norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return None
    if kind == "l2" and (norm.p != 2 or norm.dim != -1):
        return None
    width = _width(norm)
    across = heads > 1 and width == heads * dim
    weight, bias = _held(norm, "weight"), _held(norm, "bias")
    if not (_is_plain(weight) and _is_plain(bias)):
        return None
    if kind != "l2" and not across and width != dim:
        return None
    eps = torch.finfo(dtype).eps if norm.eps is None else norm.eps
    return Formula(kind, weight, bias, eps, across)


def _held(norm: Any, name: str) -> Tensor | None:
    weight = norm._parameters.get(name)
    # Sharded training holds it as an attribute.
    return norm.__dict__.get(name) if weight is None else weight


def _is_plain(weight: Tensor | None) -> bool:
    return weight is None or weight.__class__ in (Tensor, Parameter)
