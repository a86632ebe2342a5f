"""Wrappers of a kernel call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..rows import scoring_of
from ..shapes import for_rows
from ..types import AroundPart, Bias, KernelCall, Keys, Mask, Scoring
from .base import Kernel
from .lse import gives_lse, with_lse
from .reference import expand_heads, factor, masked_softmax
from .visible import OfRows, dense_mask

__all__ = ["Perturbed", "Sliced", "grouped", "identity"]


@dataclass(frozen=True)
class Sliced:
    """Computes a few heads of one row of the batch at a time, on views.

    It bounds the memory of kernels that hold the matrix of scores; one that never does gets the
    call whole, which is faster and takes no more.

    Args:
        size: How many heads.
    """

    size: int
    name: ClassVar[str] = "slicing"

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        if _bounded(kernel, q):
            return kernel(q, k, v, scoring)
        batch, heads = q.shape[:2]
        k, v = expand_heads(k, q), expand_heads(v, q)
        parts: list[Tensor] = []
        for row in range(batch):
            for head in range(0, heads, self.size):
                part = slice(row, row + 1), slice(head, head + self.size)
                mods = tuple(OfRows(mod, row, head) for mod in scoring.mods)
                some = scoring.but(mask=_part(scoring.mask, *part), mods=mods)
                parts.append(kernel(q[part], k[part], v[part], some))
        return torch.cat(parts, dim=1).unflatten(1, (batch, heads))[0]


def _bounded(kernel: KernelCall, q: Tensor) -> bool:
    if not isinstance(kernel, Kernel) or q.device.type not in kernel.bounded:
        return False
    return q.dtype != torch.float64


def _part(mask: Mask | None, rows: slice, heads: slice) -> Mask | None:
    """A mask for a part of the batch and of the heads; axes of size 1 stay."""
    if mask is None:
        return None
    rows = rows if mask[0].shape[0] > 1 else slice(None)
    if isinstance(mask, Keys):
        return Keys(mask.valid[rows])
    return Bias(mask.values[rows, heads if mask.values.shape[1] > 1 else slice(None)])


def grouped(kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Rows of the batch that see the same keys, as one row with the queries of all.

    Args:
        kernel: It sees as many rows as there are keys, unless a mask tells queries apart.
        q: ``[rows * n, H, Q, D]``, where n rows that follow one another see the same keys.
        k: ``[rows, H', K, D]``.
        v: As `k`.
        scoring: Masks and scale.

    Returns:
        ``[rows * n, H, Q, D]``.

    Raises:
        ValueError: The rows of keys do not divide the batch.
    """
    batch, heads, queries, dim = q.shape
    if batch % k.shape[0]:
        raise ValueError(
            f"hidden_states has a batch of {batch}, which the {k.shape[0]} of its keys do not "
            "divide"
        )
    if scoring.causal or not scoring.only_causal:
        return kernel(q, for_rows(k, batch), for_rows(v, batch), scoring)
    # Tokens first, as they lie in memory.
    q = q.transpose(1, 2).reshape(k.shape[0], -1, heads, dim).transpose(1, 2)
    o = kernel(q, k, v, scoring).transpose(1, 2)
    return o.reshape(batch, queries, heads, -1).transpose(1, 2)


def identity(kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention where tokens see themselves and the text joined to them, in O(tokens x text)."""
    if scoring.image_keys is None:
        return expand_heads(v, q)
    start, stop = scoring.image_keys
    image, text = slice(start, stop), slice(0, start) if start else slice(stop, k.shape[2])
    seen = _themselves_and_text(q if scoring.image is None else q[:, :, image], k, v, scoring)
    if scoring.image is None:
        return seen

    mask = dense_mask(scoring, q, k)
    if mask is not None:
        mask = Bias(_rows(mask, text))
        scoring = scoring.but(mask=mask, causal=False, window=None, mods=())
    rest = kernel(q[:, :, text], k, v, scoring)
    return _cat((rest, seen) if start else (seen, rest), 2)


def _cat(parts: tuple[Tensor, Tensor], dim: int) -> Tensor:
    """Outputs ``[B, H, Q, D]`` as one, with each token's heads side by side as kernels do."""
    swapped = {0: 0, 2: 1}[dim]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=swapped).transpose(1, 2)


def _themselves_and_text(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """What image queries see of their own key and the text's: ``[B, H, S, D]``."""
    start, stop = scoring.image_keys or (0, k.shape[2])
    image, text = slice(start, stop), slice(0, start) if start else slice(stop, k.shape[2])
    k, v = expand_heads(k, q), expand_heads(v, q)
    merged = _merged(q, (k[:, :, text], v[:, :, text]), (k[:, :, image], v[:, :, image]), scoring)
    if merged is not None:
        return merged

    to_text = q @ k[:, :, text].transpose(-1, -2)  # [B, H, S, T]
    to_self = (q * k[:, :, image]).sum(dim=-1, keepdim=True)
    scores = torch.cat((to_text, to_self), dim=-1).float() * factor(q, scoring)
    mask = dense_mask(scoring, q, k)
    weights = masked_softmax(scores, None if mask is None else _text_and_self(mask, scoring))
    weights = weights.to(v.dtype)
    return weights[..., :-1] @ v[:, :, text] + weights[..., -1:] * v[:, :, image]


def _merged(
    q: Tensor, text: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], scoring: Scoring
) -> Tensor | None:
    """The same without the scores of the text: its outputs and each token's value, weighted.

    None where torch's kernels give no log-sum-exp.
    """
    if not gives_lse(q, *text, scoring) or scoring.causal:
        return None
    found = with_lse(q, *text, scoring)
    if found is None:
        return None
    o, lse = found
    to_self = (q * own[0]).sum(dim=-1, dtype=torch.float32) * factor(q, scoring)
    weight = torch.sigmoid(to_self - lse).unsqueeze(-1)
    return torch.lerp(o, own[1], weight.to(o.dtype))


@dataclass(frozen=True)
class Perturbed:
    """Perturbed-attention guidance: other attention in the last rows of the batch.

    Args:
        chunks: The batch is this many equal parts, the last of which is perturbed: 2 (plain,
            perturbed) or 3 (unconditional, conditional, perturbed).
        perturb: Attention of the perturbed rows; `identity` lets tokens see only themselves and,
            in a joint sequence, the text, which sees all.

    Source: https://arxiv.org/abs/2403.17377
    """

    chunks: int
    perturb: AroundPart = identity
    name: ClassVar[str] = "pag"

    def plain(self, batch: int) -> int:
        """How many rows of the batch are not perturbed."""
        return batch - batch // self.chunks

    def asked(self, batch: int) -> int:
        """Of how many rows queries and keys matter, where no text is joined to the image."""
        return self.plain(batch) if self.perturb is identity else batch

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        batch = v.shape[0]
        if batch % self.chunks:
            raise ValueError(
                f"hidden_states has a batch of {batch}: perturbed-attention guidance takes "
                f"{self.chunks} equal parts"
            )
        start, stop = scoring.image_keys or (0, k.shape[2])
        if stop - start != _image_queries(q, scoring):
            raise ValueError(
                "encoder_hidden_states: perturbed-attention guidance perturbs self attention, "
                f"here {_image_queries(q, scoring)} queries meet {stop - start} keys of the image"
            )
        plain = self.plain(batch)
        of_plain = scoring_of(scoring, range(plain), batch)
        of_last = scoring_of(scoring, range(plain, batch), batch)

        o = kernel(q[:plain], k[:plain], v[:plain], of_plain)
        last = self.perturb(kernel, q[plain:], k[plain:], v[plain:], of_last)
        return _cat((o, last), 0)


def _rows(mask: Tensor, queries: slice) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, queries]


def _image_queries(q: Tensor, scoring: Scoring) -> int:
    start, stop = scoring.image or (0, q.shape[2])
    return stop - start


def _text_and_self(mask: Tensor, scoring: Scoring) -> Tensor:
    """What image queries see of a mask ``[..., Q|1, K]``: the text keys and their own."""
    start, stop = scoring.image_keys or (0, mask.shape[-1])
    rows = mask if scoring.image is None else _rows(mask, slice(*scoring.image))
    own, text = rows[..., start:stop], rows[..., :start] if start else rows[..., stop:]
    own = own.transpose(-1, -2) if own.shape[2] == 1 else own.diagonal(dim1=-2, dim2=-1)[..., None]
    return torch.cat((text.expand(*own.shape[:3], -1), own), dim=-1)
