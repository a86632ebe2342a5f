"""Keys without their padding, one batch row after the other, as varlen kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Keys, Scoring
from .takes import Ask

__all__ = ["Packed", "pack", "packable", "span"]


class Packed(NamedTuple):
    """Tokens ``[B*K, H', D]``: the valid ones of all rows, then zeros that no row reaches."""

    k: Tensor
    v: Tensor
    starts: Tensor
    """int32 ``[B + 1]``: where each row's keys start; the last is where they end."""
    empty: Tensor
    """bool ``[B]``: rows without any key."""


def pack(k: Tensor, v: Tensor, scoring: Scoring) -> Packed:
    """Packs keys and values ``[B, H', K, D]``; static sizes, so nothing waits for the device."""
    batch, _, keys, _ = k.shape
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (k, v)]  # [B*K, H', D]
    if not isinstance(scoring.mask, Keys):
        none = torch.zeros(batch, dtype=torch.bool, device=k.device)
        return Packed(*flat, span(batch, keys, k.device), none)
    valid = scoring.mask.valid.expand(batch, -1)
    counts = valid.sum(dim=1, dtype=torch.int32)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)))
    order = (~valid.flatten()).to(torch.uint8).argsort(stable=True)
    # The kernel writes no gradient for the rest: it must not flow back.
    rest = (torch.arange(batch * keys, device=k.device) >= starts[-1])[:, None, None]
    k, v = (t[order].masked_fill(rest, 0) for t in flat)
    return Packed(k, v, starts, counts == 0)


def span(batch: int, length: int, device: torch.device) -> Tensor:
    """Starts ``[B + 1]`` of rows of one length."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def packable(asked: Ask) -> str | None:
    """Why packing can't keep a mask's meaning."""
    if "keys" in asked.kinds and asked.kinds & {"causal", "window"}:
        return "mask keys & positions: packed keys lose their positions"
    if asked.ragged:
        return (
            f"causal or window with {asked.queries} queries and {asked.keys} keys: it counts from "
            "the end, so they must be as many"
        )
    return None
