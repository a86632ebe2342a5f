"""Attention from the same queries to a text and image prompts, weighted and summed, in one pass.

The plain form is what `attnproc.prompts` composes: an attention each, then their sum. Here queries
are read once and outputs written once, with float32 in between and one rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling

from ...types import Branch
from .launch import Launcher, Plans, Repeated, operator, padded, wrap_triton

__all__ = ["MOST", "attended", "fits"]

MOST = 4
"""How many branches a launch takes."""

# Scores are computed twice, which for many keys costs more than launches.
_KEYS = 512
# Bytes of a tile, and the rows that one of queries needs no more of. All keys are one tile if they
# are few; of more keys smaller tiles take less time.
_TILE = 16384
_QUERIES = 64
_FEW, _SOME = 128, 32
_STEP = 8
_PRECISION = tl.constexpr("tf32x3")
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(
    ptr, token, first, keys, D: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, A: tl.constexpr
):
    """A tile ``[KP, DP]`` of keys or values, zeros outside."""
    n, d = first + tl.arange(0, KP), tl.arange(0, DP)
    inside = (n < keys)[:, None] & (d < D)[None, :]
    places = tl.multiple_of(n * token, A)[:, None] + d[None, :]
    return tl.load(ptr + places, mask=inside, other=0.0)


@triton.jit
def _scores(q, seen, first, keys, scale, KP: tl.constexpr):
    """Scores ``[T, KP]`` to base 2, minus infinity outside."""
    found = tl.dot(q, tl.trans(seen), input_precision=_PRECISION) * (scale * _LOG2E)
    return tl.where((first + tl.arange(0, KP) < keys)[None, :], found, float("-inf"))


@triton.jit
def _added(
    total, q, k, v, w, keys, k_batch, k_head, k_token, weight, w_batch, w_token,
    batch, head, tokens, live, scale,
    D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr, KP: tl.constexpr, T: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """`total` ``[T, DP]`` and what the queries see of some keys, `KP` of them at a time."""
    start = tl.multiple_of(batch * k_batch + head * k_head, A)
    k, v = k + start, v + start
    most = tl.full((T,), float("-inf"), tl.float32)
    sums = tl.zeros((T,), tl.float32)
    for first in tl.range(0, KEYS, KP, num_stages=1):
        found = _scores(q, _rows(k, k_token, first, keys, D, DP, KP, A), first, keys, scale, KP)
        more = tl.maximum(most, tl.max(found, axis=1))
        sums = sums * tl.exp2(most - more) + tl.sum(tl.exp2(found - more[:, None]), axis=1)
        most = more
    factor = tl.cast(weight, tl.float32) / sums
    if w is not None:
        w = w + batch * w_batch + tokens * w_token
        factor = factor * tl.load(w, mask=live, other=0.0).to(tl.float32)
    # Scores once more: with sums known, all need but one sum of values.
    for first in tl.range(0, KEYS, KP, num_stages=1):
        found = _scores(q, _rows(k, k_token, first, keys, D, DP, KP, A), first, keys, scale, KP)
        shares = tl.exp2(found - most[:, None]) * factor[:, None]
        values = _rows(v, k_token, first, keys, D, DP, KP, A)
        total = tl.dot(shares.to(values.dtype), values, total, input_precision=_PRECISION)
    return total


@Launcher
@triton.jit
def _attend(
    q, o, k0, v0, w0, k1, v1, w1, k2, v2, w2, k3, v3, w3,
    length, q_batch, q_head, q_token, scale,
    keys0, batch0, head0, token0, weight0, rows0, along0,
    keys1, batch1, head1, token1, weight1, rows1, along1,
    keys2, batch2, head2, token2, weight2, rows2, along2,
    keys3, batch3, head3, token3, weight3, rows3, along3,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, A: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
):  # fmt: skip
    """The sum for some queries of one head, over keys in `N` whole tiles of `P`.

    All strides are multiples of `A`.
    """
    # Compiled code may hand numbers over in double precision.
    scale = tl.cast(scale, tl.float32)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    first = tl.program_id(0).to(tl.int64) * T
    t, d = tl.arange(0, T), tl.arange(0, DP)
    tokens = first + t
    live = tokens < length
    inside = live[:, None] & (d < D)[None, :]
    # Only where a tile starts needs 64 bits: its places take half the registers so.
    q = q + tl.multiple_of(batch * q_batch + head * q_head + first * q_token, A)
    places = tl.multiple_of(t * q_token, A)[:, None] + d[None, :]
    queries = tl.load(q + places, mask=inside, other=0.0)
    total = tl.zeros((T, DP), tl.float32)
    total = _added(total, queries, k0, v0, w0, keys0, batch0, head0, token0, weight0, rows0,
                   along0, batch, head, tokens, live, scale, D, DP, N0, P0, T, A)  # fmt: skip
    if k1 is not None:
        total = _added(total, queries, k1, v1, w1, keys1, batch1, head1, token1, weight1, rows1,
                       along1, batch, head, tokens, live, scale, D, DP, N1, P1, T, A)  # fmt: skip
    if k2 is not None:
        total = _added(total, queries, k2, v2, w2, keys2, batch2, head2, token2, weight2, rows2,
                       along2, batch, head, tokens, live, scale, D, DP, N2, P2, T, A)  # fmt: skip
    if k3 is not None:
        total = _added(total, queries, k3, v3, w3, keys3, batch3, head3, token3, weight3, rows3,
                       along3, batch, head, tokens, live, scale, D, DP, N3, P3, T, A)  # fmt: skip
    o = o + ((batch * length + first) * H + head) * D
    tl.store(o + t[:, None] * (H * D) + d[None, :], total.to(o.dtype.element_ty), mask=inside)


def fits(q: Tensor, branches: Sequence[Branch]) -> bool:
    """Whether a launch takes the branches of queries ``[B, H, S, D]``."""
    batch, heads, _, dim = q.shape
    where = q.get_device()
    return 0 < len(branches) <= MOST and all(
        0 < k.shape[-2] <= _KEYS
        and k.shape == v.shape
        and k.shape in ((batch, k.shape[-2], heads * dim), (batch, heads, k.shape[-2], dim))
        and k.dtype is v.dtype is q.dtype
        and k.stride() == v.stride()
        and k.get_device() == v.get_device() == where
        and (not isinstance(weight, Tensor) or _is_map(weight, q))
        for k, v, weight in branches
    )


def attended(q: Tensor, branches: Sequence[Branch], scale: float | None) -> Tensor | None:
    """The weighted sum of one attention a branch; None where `fits` says that it can't.

    Args:
        q: ``[B, H, S, D]``.
        branches: At most `MOST`; keys and values may also be ``[B, H, tokens, D]``.
        scale: Factor of the scores; None is ``D ** -0.5``.

    Returns:
        ``[B, S, H*D]``, contiguous, in the dtype of `q`.
    """
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if is_compiling():
        if not fits(q, branches):
            return None
        keys, values, weights = zip(*branches, strict=True)
        return _TRACED(q, keys, values, _tensors_of(weights, q), factor)
    kind = (q.shape, q.stride(), q.dtype, q.get_device(), factor, *map(_kind, branches))
    try:
        launch, copies = _LAUNCHES[kind]
    except KeyError:
        launch, copies = _LAUNCHES.keep(kind, _new_launch(q, branches, factor))
    if launch is None:
        return None
    if copies:
        q, branches = _rows_in_one_piece(q, branches)
    o = _room(q)
    if o.numel():
        launch(*_tensors(q, o, branches))
    return o


_LAUNCHES: Plans[tuple[Repeated | None, bool]] = Plans()


def _kind(branch: Branch) -> tuple[Any, ...]:
    """All that a launch depends on but what is in the tensors."""
    k, v, weight = branch
    of_weight: Any = weight
    if isinstance(weight, Tensor):
        of_weight = weight.shape, weight.stride(), weight.dtype, weight.get_device()
    # An index of a device, as the device itself takes several times as long.
    of_k = k.shape, k.stride(), k.dtype, k.get_device()
    return *of_k, v.shape, v.stride(), v.dtype, v.get_device(), of_weight


def _new_launch(
    q: Tensor, branches: Sequence[Branch], factor: float
) -> tuple[Repeated | None, bool]:
    """The launch for calls of this kind, and whether it is of copies; None where none fits."""
    whole, parts = _rows_in_one_piece(q, branches)
    if not fits(whole, parts):
        return None, False
    copies = whole is not q or parts is not branches
    return Repeated(_attend, *_arguments(whole, parts, factor)), copies


def _tensors_of(weights: Sequence[float | Tensor], q: Tensor) -> list[Tensor | None]:
    """Weights without a number, of which there would be compiled code for each; None is one."""
    numbers = [w for w in weights if not isinstance(w, Tensor) and w != 1]
    if numbers:
        one = q.new_ones((), dtype=torch.float32)
        # All by one small kernel.
        made = iter(torch.stack([one * number for number in numbers]).unbind())
    found: list[Tensor | None] = []
    for w in weights:
        found.append(w if isinstance(w, Tensor) else None if w == 1 else next(made))
    return found


@operator("attnproc::branches")
def _operator(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor | None],
    scale: float,
) -> Tensor:
    whole: list[float | Tensor] = [1.0 if weight is None else weight for weight in weights]
    q, branches = _rows_in_one_piece(q, list(zip(keys, values, whole, strict=True)))
    o = _room(q)
    if o.numel():
        grid, numbers, fixed = _arguments(q, branches, scale)
        wrap_triton(_attend)(grid, _tensors(q, o, branches), numbers, fixed)
    return o


# By itself, as compiled code checks each name on the way to it.
_TRACED = torch.ops.attnproc.branches.default


def _room(q: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads * dim)


def _rows_in_one_piece(q: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, Sequence[Branch]]:
    """Channels of a query, of a key and of a value without gaps."""
    if q.stride(3) != 1:
        q = q.contiguous()
    if all(k.stride(-1) == v.stride(-1) == 1 for k, v, _ in branches):
        return q, branches
    return q, [(k.contiguous(), v.contiguous(), weight) for k, v, weight in branches]


def _tensors(q: Tensor, o: Tensor, branches: Sequence[Branch]) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [q, o]
    for k, v, weight in branches:
        found += (k, v, weight if isinstance(weight, Tensor) else None)
    return (*found, *((None,) * (3 * (MOST - len(branches)))))


def _arguments(
    q: Tensor, branches: Sequence[Branch], factor: float
) -> tuple[tuple[int, int], tuple[int | float, ...], tuple[int, ...]]:
    """Grid, numbers and arguments of compilation."""
    batch, heads, length, dim = q.shape
    numbers: list[int | float] = [length, *q.stride()[:3], factor]
    for k, _, weight in branches:
        numbers += (k.shape[-2], *_strides(k, dim), *_factors(weight))
    numbers += (0, 0, 0, 0, 0.0, 0, 0) * (MOST - len(branches))
    # Compiled code for any size is for one size of a head and one number of keys.
    keys = tuple(int(k.shape[-2]) for k, _, _ in branches)
    strides = [*q.stride()[:3], *(n for k, _, _ in branches for n in _strides(k, dim))]
    fixed = _fixed(int(heads), int(dim), keys, q.element_size(), _step(strides))
    return (-(-length // fixed[3]), batch * heads), tuple(numbers), fixed


def _step(strides: Sequence[int]) -> int:
    """What all strides are multiples of, as far as loads of 16 bytes in half precision go.

    Of an argument Triton itself finds out multiples of 16 alone, which 40 channels a head are not.
    """
    return _STEP if all(stride % _STEP == 0 for stride in strides) else 1


def _strides(k: Tensor, dim: int) -> tuple[int, ...]:
    """From row to row, from head to head and from token to token."""
    if k.ndim == 4:
        return k.stride()[:3]
    return k.stride(0), dim, k.stride(1)


def _factors(weight: float | Tensor) -> tuple[float, int, int]:
    """A weight as a number, and its strides over rows and tokens."""
    if not isinstance(weight, Tensor):
        return float(weight), 0, 0
    if weight.ndim == 0:
        return 1.0, 0, 0
    rows, tokens = (
        stride if size > 1 else 0
        for size, stride in zip(weight.shape[:2], weight.stride()[:2], strict=True)
    )
    return 1.0, rows, tokens


def _is_map(weight: Tensor, q: Tensor) -> bool:
    """Whether a weight is a number in a tensor, or a map over rows and tokens of the queries."""
    if weight.device != q.device or not weight.is_floating_point():
        return False
    if weight.ndim == 0:
        return True
    wanted = q.shape[0], q.shape[2], 1
    return weight.ndim == 3 and all(
        size in (1, most) for size, most in zip(weight.shape, wanted, strict=True)
    )


@functools.lru_cache(maxsize=256)
def _fixed(heads: int, dim: int, keys: tuple[int, ...], size: int, step: int) -> tuple[int, ...]:
    """Arguments of compilation.

    Heads, channels, channels of a tile, its queries, what strides are multiples of; then of each
    branch keys in whole tiles, and the keys of a tile.
    """
    wide = padded(dim)
    room = max(16, _TILE // (wide * size))
    tiles = [padded(n) if n <= min(_FEW, room) else min(_SOME, room) for n in keys]
    whole = [-(-n // tile) * tile for n, tile in zip(keys, tiles, strict=True)]
    rest = [0] * (MOST - len(keys))
    first = heads, dim, wide, min(_QUERIES, room), step
    return *first, *whole, *rest, *tiles, *rest
