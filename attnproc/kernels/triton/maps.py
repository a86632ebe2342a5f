"""Weights of chosen keys, mean over heads, in one launch that holds no scores in memory.

The plain form is `attnproc.capture.weights.key_weights`. A program has a few queries: it walks
over their heads, with all keys at once, and adds up the softmax of each.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, Repeated, padded

__all__ = ["KeyMaps", "fits"]

# Queries of a program, as few as a product of tiles takes: its heads come one after another, and a
# layer of SDXL (1,024 queries, two rows) makes 128 programs for an H100's 132 multiprocessors.
_TILE = 16
# Bytes of a head's keys up to which the loads run ahead, and at all: what shared memory holds.
_AHEAD = 1 << 15
_MOST = 1 << 16
# Bytes of the choice, which a program holds too.
_CHOICE = 1 << 16
_PRECISION = tl.constexpr("tf32x3")
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@Launcher
@triton.jit
def _maps(
    q, k, choice, o, mask,
    first_row, first, queries, keys, scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, m_batch, m_head, m_query, m_key,
    BOOL: tl.constexpr, ADD: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    KP: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The maps ``[T, N]`` of some queries of one row."""
    row = (first_row + tl.program_id(1)).to(tl.int64)
    own = tl.program_id(0) * T + tl.arange(0, T)
    tokens, live = (first + own).to(tl.int64), own < queries
    j, d, n = tl.arange(0, KP), tl.arange(0, DP), tl.arange(0, NP)
    there, inside = (j < keys)[None, :], (d < D)[None, :]
    q += row * q_batch + tokens[:, None] * q_token + d[None, :]
    k += row * k_batch + j[:, None] * k_token + d[None, :]
    total = tl.zeros((T, KP), tl.float32)
    for head in tl.range(0, H, num_stages=STAGES):
        some_q = tl.load(q + head * q_head, mask=live[:, None] & inside, other=0.0)
        some_k = tl.load(k + head // GROUP * k_head, mask=tl.trans(there) & inside, other=0.0)
        scores = tl.dot(some_q, tl.trans(some_k), input_precision=_PRECISION) * scale
        seen = there
        if mask is not None:
            places = row * m_batch + head * m_head + tokens[:, None] * m_query + j[None, :] * m_key
            value = tl.load(mask + places, mask=live[:, None] & there, other=0)
            if BOOL:
                seen = there & (value != 0)
            else:
                scores += value.to(tl.float32)
        scores = tl.where(seen, scores, -float("inf"))
        # A finite peak, so that queries without any key have weights of zero.
        peak = tl.maximum(tl.max(scores, axis=1), _LEAST)
        weights = tl.exp(scores - peak[:, None])
        sums = tl.sum(weights, axis=1)
        # The largest weight is one, so that the sum is at least that, or nothing.
        total += weights * (1.0 / tl.maximum(sums, 1.0))[:, None]
    stored = live[:, None] & (n < N)[None, :]
    picked = tl.load(
        choice + j[:, None] * N + n[None, :], mask=tl.trans(there) & (n < N)[None, :], other=0.0
    )
    found = tl.dot(total / H, picked, input_precision=_PRECISION)
    places = o + (tl.program_id(1).to(tl.int64) * queries + own)[:, None] * N + n[None, :]
    if ADD:
        found += tl.load(places, mask=stored, other=0.0)
    tl.store(places, found, mask=stored)


@functools.lru_cache(maxsize=1024)
def fits(keys: int, dim: int, labels: int, size: int) -> bool:
    """Whether a program can hold a head's keys, of `size` bytes a number, and the choice."""
    held, channels, chosen = (padded(n) for n in (keys, dim, labels))
    # For its products a float32 is split in two.
    room = held * channels * (8 if size == 4 else size)
    return room <= _MOST and held * chosen * 4 <= _MOST


@functools.lru_cache(maxsize=1024)
def _fixed(
    heads: int, key_heads: int, keys: int, dim: int, labels: int, size: int
) -> tuple[int, ...]:
    """Arguments of compilation that sizes decide."""
    held, channels = padded(keys), padded(dim)
    stages = 2 if held * channels * size <= _AHEAD else 1
    group = heads // key_heads
    return heads, group, labels, dim, _TILE, held, padded(labels), channels, stages


class KeyMaps:
    """Weights of some keys, or sums of such, mean over heads; of some rows and queries.

    It is made of one call, and for all whose tensors have the same shapes, strides, dtypes and
    device: what depends on these is worked out once.

    Args:
        q: All queries ``[B, H, Q, D]``, the channels of a head in one piece.
        k: All keys ``[B, H', K, D]`` likewise; the softmax is over all of them.
        mask: ``[B|1, H|1, Q|1, K]``, bool where a key may be attended to, or added to the scores.
        choice: How often a key counts in a sum ``[K, N]``, float32.
        rows: Which rows of the batch.
        queries: Which queries.
        scale: What the scores are multiplied by.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        choice: Tensor,
        rows: range,
        queries: range,
        scale: float,
    ) -> None:
        (keys, labels), hides, steps = choice.shape, False, (0, 0, 0, 0)
        if mask is not None:
            hides, steps = mask.dtype == torch.bool, mask.expand(*q.shape[:3], keys).stride()
        self.choice, self.device = choice, q.device
        self.size = len(rows), len(queries), labels
        grid = -(-len(queries) // _TILE), len(rows)
        numbers = (
            rows.start, queries.start, len(queries), keys, float(scale),
            *q.stride()[:3], *k.stride()[:3], *steps,
        )  # fmt: skip
        fixed = _fixed(q.shape[1], k.shape[1], keys, q.shape[3], labels, q.element_size())
        self.fresh = Repeated(_maps, grid, numbers, (hides, False, *fixed))
        self.added = Repeated(_maps, grid, numbers, (hides, True, *fixed))

    def __call__(self, q: Tensor, k: Tensor, mask: Tensor | None, into: Tensor | None) -> Tensor:
        """The weights ``[rows, queries, N]`` in float32; added in place to `into` where they fit.

        Args:
            q: As those that it was made for; so are `k` and `mask`.
            k: Keys.
            mask: Mask.
            into: A sum of such.
        """
        if into is not None and self._fits(into):
            o, launch = into, self.added
        else:
            o = torch.empty(self.size, dtype=torch.float32, device=self.device)
            launch = self.fresh
        if 0 not in self.size:
            launch(q, k, self.choice, o, mask)
        return o

    def _fits(self, into: Tensor) -> bool:
        alike = into.dtype == torch.float32 and into.device == self.device
        return alike and into.shape == self.size and into.is_contiguous()
