"""Wrappers of a kernel call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Bias, KernelCall, Keys, Mask, Scoring
from .reference import dense_mask, expand_heads, masked_softmax

__all__ = ["Perturbed", "Sliced"]


@dataclass(frozen=True)
class Sliced:
    """Computes a few heads at a time, counted over batch and heads.

    Args:
        size: How many heads.
    """

    size: int

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        batch, heads = q.shape[:2]
        q, k, v = (expand_heads(t, q).flatten(0, 1)[:, None] for t in (q, k, v))
        parts = []
        for start in range(0, batch * heads, self.size):
            stop = min(start + self.size, batch * heads)
            mask = _of_heads(scoring.mask, range(start, stop), heads)
            part = (t[start:stop] for t in (q, k, v))
            parts.append(kernel(*part, scoring._replace(mask=mask)))
        return torch.cat(parts)[:, 0].unflatten(0, (batch, heads))


def _of_heads(mask: Mask | None, flat: range, heads: int) -> Mask | None:
    """The rows of a mask for heads counted over batch and heads."""
    if mask is None:
        return None
    values = mask.valid[:, None, None] if isinstance(mask, Keys) else mask.values
    rows = [i // heads if values.shape[0] > 1 else 0 for i in flat]
    cols = [i % heads if values.shape[1] > 1 else 0 for i in flat]
    return Bias(values[rows, cols][:, None])


@dataclass(frozen=True)
class Perturbed:
    """Perturbed-attention guidance: in the last rows of the batch, tokens see only themselves.

    In a joint sequence a perturbed image token sees itself and the text, and the text sees all.

    Args:
        chunks: The batch is this many equal parts, the last of which is perturbed: 2 (plain,
            perturbed) or 3 (unconditional, conditional, perturbed).

    Source: https://arxiv.org/abs/2403.17377
    """

    chunks: int

    def plain(self, batch: int) -> int:
        """How many rows of the batch are not perturbed."""
        return batch - batch // self.chunks

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        batch = q.shape[0]
        if batch % self.chunks:
            raise ValueError(
                f"hidden_states has a batch of {batch}: perturbed-attention guidance takes "
                f"{self.chunks} equal parts"
            )
        if scoring.image is None and q.shape[2] != k.shape[2]:
            raise ValueError(
                "encoder_hidden_states: perturbed-attention guidance perturbs self attention, "
                f"here {q.shape[2]} queries meet {k.shape[2]} keys"
            )
        plain = slice(0, self.plain(batch))
        last = slice(plain.stop, batch)

        o = kernel(q[plain], k[plain], v[plain], _of_rows(scoring, plain, batch))
        q, k, v = q[last], k[last], v[last]
        if scoring.image is None:
            return torch.cat((o, expand_heads(v, q)))
        return torch.cat((o, _identity(kernel, q, k, v, _of_rows(scoring, last, batch))))


def _of_rows(scoring: Scoring, rows: slice, batch: int) -> Scoring:
    """The scoring for a part of the batch; a mask for the plain part alone is taken as it is."""
    mask = scoring.mask
    if mask is None or mask[0].shape[0] != batch:
        return scoring
    return scoring._replace(mask=type(mask)(mask[0][rows]))


def _identity(kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Joint attention where image tokens see themselves and the text, in O(tokens x text)."""
    start, stop = scoring.image
    image, text = slice(start, stop), slice(0, start) if start else slice(stop, q.shape[2])
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    mask = dense_mask(scoring, q, k)
    wide_k, wide_v = expand_heads(k, q), expand_heads(v, q)

    to_text = q[:, :, image] @ wide_k[:, :, text].transpose(-1, -2)  # [B, H, S, T]
    to_self = (q * wide_k)[:, :, image].sum(dim=-1, keepdim=True)
    scores = torch.cat((to_text, to_self), dim=-1).float() * scale
    weights = masked_softmax(scores, None if mask is None else _text_and_self(mask, image, text))
    weights = weights.to(v.dtype)
    seen = weights[..., :-1] @ wide_v[:, :, text] + weights[..., -1:] * wide_v[:, :, image]

    if mask is not None:
        scoring = scoring._replace(mask=Bias(_rows(mask, text)), causal=False)
    rest = kernel(q[:, :, text], k, v, scoring)
    return torch.cat((rest, seen) if start else (seen, rest), dim=2)


def _rows(mask: Tensor, queries: slice) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, queries]


def _text_and_self(mask: Tensor, image: slice, text: slice) -> Tensor:
    """What image queries see of a mask ``[..., Q|1, K]``: the text keys and their own."""
    rows = _rows(mask, image)
    own = rows[..., image]
    own = own.transpose(-1, -2) if own.shape[2] == 1 else own.diagonal(dim1=-2, dim2=-1)[..., None]
    seen = rows[..., text].expand(*own.shape[:3], -1)
    return torch.cat((seen, own), dim=-1)
