"""Image prompts in one pass, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

import pytest
from on_gpu import NEEDS_TRITON, compiled

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize(
    ("dtype", "size", "dim", "keys", "count"),
    [
        ("bf16", 2, 64, 16, 2),
        ("fp16", 2, 160, 4, 1),
        ("bf16", 2, 40, 257, 2),
        ("fp32", 4, 128, 20, 1),
    ],
)
def test_it_compiles_for_a_gpu(dtype: str, size: int, dim: int, keys: int, count: int) -> None:
    from attnproc.kernels.triton import branches

    names = [f"{name}{i}" for i in range(branches.MOST) for name in "kvw"]
    types = dict.fromkeys(("q", "o", *names), f"*{dtype}")
    types |= {"scale": "fp32"} | {f"weight{i}": "fp32" for i in range(branches.MOST)}
    # The first prompt has a number as its weight, the others a map.
    absent = ["w0", *names[3 * count :]]
    fixed = branches._fixed(10, dim, keys, size)
    found = compiled(branches._attend, fixed, types, absent)
    assert found.asm["cubin"]
    # A program's shared memory on an H100.
    assert found.metadata.shared <= 227 * 1024
