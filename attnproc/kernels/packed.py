"""Keys without their padding, one batch row after the other, as varlen kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Keys, Scoring
from .takes import HALF, Ask, Takes

__all__ = ["TAKES", "Packed", "pack", "packable"]


class Packed(NamedTuple):
    """Queries ``[B*Q, H, D]``, keys and values ``[B*K, H', D]`` and where each row starts.

    The valid keys of all rows stand first, then zeros that no row reaches.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_starts: Tensor
    k_starts: Tensor
    """int32 ``[B + 1]``: where each row's keys start; the last is where they end."""
    lengths: tuple[int, int]
    """Queries and, at most, keys of a row."""
    empty: Tensor
    """bool ``[B]``: rows without any key."""

    def output(self, o: Tensor) -> Tensor:
        """``[B*Q, H, D]`` as ``[B, H, Q, D]``, zero in rows without a key."""
        o = o.unflatten(0, (-1, self.lengths[0])).transpose(1, 2)
        return o.masked_fill(self.empty[:, None, None, None], 0.0)

    def lse(self, lse: Tensor) -> Tensor:
        """``[H, B*Q]`` as ``[B, H, Q]``, -inf in rows without a key."""
        lse = lse.unflatten(1, (-1, self.lengths[0])).transpose(0, 1)
        return lse.masked_fill(self.empty[:, None, None], -torch.inf)


def pack(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Packed:
    """Packs ``[B, H, S, D]``; sizes are static, so nothing waits for the device."""
    (batch, _, queries, _), keys, device = q.shape, k.shape[2], q.device
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    q_starts, lengths = _starts(batch, queries, device), (queries, keys)
    if not isinstance(scoring.mask, Keys):
        none = torch.zeros(batch, dtype=torch.bool, device=device)
        return Packed(q, k, v, q_starts, _starts(batch, keys, device), lengths, none)

    valid = scoring.mask.valid.expand(batch, -1)
    counts = valid.sum(dim=1, dtype=torch.int32)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)))
    order = (~valid.flatten()).to(torch.uint8).argsort(stable=True)
    # The kernel writes no gradient for the rest: it must not flow back.
    rest = (torch.arange(batch * keys, device=device) >= starts[-1])[:, None, None]
    k, v = (t[order].masked_fill(rest, 0) for t in (k, v))
    return Packed(q, k, v, q_starts, starts, lengths, counts == 0)


def _starts(batch: int, length: int, device: torch.device) -> Tensor:
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


TAKES = Takes(
    devices=("cuda",),
    dtypes=HALF,
    dims=(8, 256, 8),
    any_v=False,
    masks=frozenset({"keys", "causal", "window"}),
    lse=True,
    deterministic=False,
    also=packable,
)
"""What kernels of packed sequences have in common."""
