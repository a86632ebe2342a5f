"""Products of few rows with pairs of matrices, in one launch: keys and values of image prompts.

The plain form is two linear layers an input. With so few rows each is but a pass over its matrix,
which a launch of its own takes longer than.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher

__all__ = ["MOST", "ROWS", "Pair", "pairs_of_products"]

MOST = 4
"""How many inputs a launch takes."""
ROWS = 64
"""How many rows an input has at most."""

# Output channels of a tile: so few that all of a GPU reads the matrices.
_OUT = 16
# Bytes of a row that are read at a time.
_STEP = 256
_PRECISION = tl.constexpr("tf32x3")

Pair = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"]
"""Rows ``[..., C]``, both weights ``[N, C]`` and both biases ``[N]``; all of them contiguous."""


@triton.jit
def _product(
    x, w, w_other, b, b_other, o, rows, start, width, depth,
    DEPTH: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile ``[R, N]`` of one of the two products of an input."""
    other = tl.program_id(1) % 2 == 1
    w = w_other if other else w
    start = start + rows if other else start
    r, n = tl.arange(0, R), tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros((R, N), tl.float32)
    for first in range(0, DEPTH, K):
        k = first + tl.arange(0, K)
        mine = tl.load(
            x + r[:, None] * depth + k[None, :],
            mask=(r < rows)[:, None] & (k < depth)[None, :], other=0.0,
        )  # fmt: skip
        weights = tl.load(
            w + n[:, None] * depth + k[None, :],
            mask=(n < width)[:, None] & (k < depth)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(mine, tl.trans(weights), total, input_precision=_PRECISION)
    if b is not None:
        b = b_other if other else b
        total += tl.load(b + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    tl.store(
        o + (start + r)[:, None] * width + n[None, :], total.to(o.dtype.element_ty),
        mask=(r < rows)[:, None] & (n < width)[None, :],
    )  # fmt: skip


@Launcher
@triton.jit
def _products(
    o, x0, k0, v0, a0, b0, x1, k1, v1, a1, b1, x2, k2, v2, a2, b2, x3, k3, v3, a3, b3,
    width, depth, rows0, start0, rows1, start1, rows2, start2, rows3, start3,
    DEPTH: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of one product of one input."""
    which = tl.program_id(1) // 2
    if which == 0:
        _product(x0, k0, v0, a0, b0, o, rows0, start0, width, depth, DEPTH, R, N, K)
    if x1 is not None and which == 1:
        _product(x1, k1, v1, a1, b1, o, rows1, start1, width, depth, DEPTH, R, N, K)
    if x2 is not None and which == 2:
        _product(x2, k2, v2, a2, b2, o, rows2, start2, width, depth, DEPTH, R, N, K)
    if x3 is not None and which == 3:
        _product(x3, k3, v3, a3, b3, o, rows3, start3, width, depth, DEPTH, R, N, K)


def pairs_of_products(pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
    """Both products of each input.

    Args:
        pairs: At most `MOST`, each of at most `ROWS` rows, all of one dtype, C and N.

    Returns:
        Two tensors ``[R, N]`` an input.
    """
    width, depth = pairs[0][1].shape
    first = pairs[0][0]
    counts = [x.numel() // depth for x, *_ in pairs for _ in range(2)]
    o = first.new_empty(sum(counts), width)
    missing = MOST - len(pairs)
    tensors = [tensor for pair in pairs for tensor in pair] + [None] * (5 * missing)
    numbers = [width, depth]
    start = 0
    for rows in counts[::2]:
        numbers += (rows, start)
        start += 2 * rows
    numbers += (0, 0) * missing
    _products(
        (-(-width // _OUT), 2 * len(pairs)), (o, *tensors), tuple(numbers),
        _fixed(depth, max(counts), o.element_size()),
    )  # fmt: skip
    parts = o.split(counts)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _fixed(depth: int, rows: int, size: int) -> tuple[int, int, int, int]:
    """Arguments of compilation: channels, and the tiles' rows, output channels and channels."""
    return depth, max(16, 1 << (rows - 1).bit_length()), _OUT, _STEP // size
