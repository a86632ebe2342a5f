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
    size = fixed[3] * fixed[4] * fixed[5] * (4 if dtype == "fp32" else 2)
    forward = short._attend_small if size < short._SMALL else short._attend
    backward = short._attend_back_small if size < short._SMALL_BACK else short._attend_back
    for launcher in (forward, backward):
        found = compiled(launcher, fixed, types)
        assert found.asm["cubin"]
        # A program's shared memory on an H100.
        assert found.metadata.shared <= 227 * 1024
