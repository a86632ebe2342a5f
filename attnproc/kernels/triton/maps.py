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

from .launch import Launcher

__all__ = ["fits", "key_maps"]

# Queries of a program, and the bytes of a head's keys up to which the loads run ahead and at all:
# that much a multiprocessor's shared memory holds.
_TILE = 16
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
        total += weights / tl.where(sums > 0, sums, 1.0)[:, None]
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
    held, channels, chosen = (_padded(n) for n in (keys, dim, labels))
    # For its products a float32 is split in two.
    room = held * channels * (8 if size == 4 else size)
    return room <= _MOST and held * chosen * 4 <= _MOST


@functools.lru_cache(maxsize=1024)
def _fixed(
    heads: int, key_heads: int, keys: int, dim: int, labels: int, size: int
) -> tuple[int, ...]:
    """Arguments of compilation that sizes decide."""
    held, channels = _padded(keys), _padded(dim)
    stages = 2 if held * channels * size <= _AHEAD else 1
    group = heads // key_heads
    return heads, group, labels, dim, _TILE, held, _padded(labels), channels, stages


def _padded(n: int) -> int:
    """The next power of two, at least what a product of tiles takes."""
    return max(16, 1 << (n - 1).bit_length())


def key_maps(
    q: Tensor,
    k: Tensor,
    choice: Tensor,
    rows: range,
    queries: range,
    scale: float,
    mask: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Weights of some keys, or sums of such, mean over heads; of some rows and queries.

    Args:
        q: All queries ``[B, H, Q, D]``, the channels of a head in one piece.
        k: All keys ``[B, H', K, D]`` likewise; the softmax is over all of them.
        choice: How often a key counts in a sum ``[K, N]``, float32.
        rows: Which rows of the batch.
        queries: Which queries.
        scale: What the scores are multiplied by.
        mask: ``[B|1, H|1, Q|1, K]``, bool where a key may be attended to, or added to the scores.
        into: What to add to in place, as what is returned.

    Returns:
        ``[rows, queries, N]`` in float32.
    """
    batch, heads, length, dim = q.shape
    keys, labels = choice.shape
    o, hides, steps = into, False, (0, 0, 0, 0)
    if o is None:
        o = torch.empty((len(rows), len(queries), labels), dtype=torch.float32, device=q.device)
    if mask is not None:
        hides, steps = mask.dtype == torch.bool, mask.expand(batch, heads, length, keys).stride()
    if o.numel():
        fixed = _fixed(heads, k.shape[1], keys, dim, labels, q.element_size())
        _maps(
            (-(-len(queries) // _TILE), len(rows)),
            (q, k, choice, o, mask),
            (
                rows.start, queries.start, len(queries), keys, float(scale),
                *q.stride()[:3], *k.stride()[:3], *steps,
            ),
            (hides, into is not None, *fixed),
        )  # fmt: skip
    return o
