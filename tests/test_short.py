"""Attention among few tokens, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

import pytest
from on_gpu import NEEDS_TRITON, compiled

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize(
    ("dtype", "dim", "queries", "keys"),
    [("bf16", 96, 28, 28), ("fp16", 40, 16, 16), ("bf16", 128, 64, 64), ("fp32", 128, 64, 64)],
)
def test_it_compiles_for_a_gpu(dtype: str, dim: int, queries: int, keys: int) -> None:
    from attnproc.kernels.triton import short
    from attnproc.kernels.triton.launch import padded

    types = dict.fromkeys(("q", "k", "v", "o"), f"*{dtype}") | {"scale": "fp32"}
    fixed = (8, 1, dim, padded(dim), padded(queries), padded(keys), 1)
    found = compiled(short._launcher(fixed), fixed, types)
    assert found.asm["cubin"]
    # A program's shared memory on an H100.
    assert found.metadata.shared <= 227 * 1024
