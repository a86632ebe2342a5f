"""Attention among few tokens, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

import pytest
from on_gpu import NEEDS_TRITON, compiled

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize(
    ("dtype", "dim", "queries", "keys"),
    [("bf16", 96, 28, 28), ("fp16", 40, 16, 16), ("bf16", 128, 64, 64), ("fp32", 64, 32, 32)],
)
def test_it_compiles_for_a_gpu(dtype: str, dim: int, queries: int, keys: int) -> None:
    from attnproc.kernels.triton import short
    from attnproc.kernels.triton.launch import padded

    names = ("q", "k", "v", "o", "g", "dq", "dk", "dv")
    types = dict.fromkeys(names, f"*{dtype}") | {"scale": "fp32"}
    fixed = (8, 2, dim, padded(dim), padded(queries), padded(keys), 1)
    small = queries < 64
    launchers = (short._attend_small, short._attend_back_small)
    for launcher in launchers if small else (short._attend, short._attend_back):
        found = compiled(launcher, fixed, types)
        assert found.asm["cubin"]
        # A program's shared memory on an H100.
        assert found.metadata.shared <= 227 * 1024
