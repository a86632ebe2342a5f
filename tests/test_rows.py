"""Keys and values of prompts by one launch, compiled for a GPU; see test_interpreted."""

from __future__ import annotations

import pytest
from on_gpu import NEEDS_TRITON, compiled

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
def test_it_compiles_for_a_gpu(dtype: str, size: int, count: int) -> None:
    from attnproc.kernels.triton import rows

    names = [f"{name}{i}" for i in range(rows.MOST) for name in "xkvab"]
    types = dict.fromkeys(("o", *names), f"*{dtype}")
    absent = names[5 * count :]
    if count == 2:
        absent += [f"{name}{i}" for i in range(2) for name in "ab"]
    fixed = rows._fixed(2048, rows.ROWS, size)
    assert compiled(rows._products, fixed, types, absent).asm["cubin"]
