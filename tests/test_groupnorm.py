"""Group norm to tokens, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

import pytest
from on_gpu import NEEDS_TRITON, compiled

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("name", "fixed"), [("_moments", (8192,)), ("_normed", (3, 4, 8192, 64))])
def test_they_compile_for_a_gpu(name: str, fixed: tuple[int, ...], dtype: str) -> None:
    from attnproc.kernels.triton import groupnorm

    types = dict.fromkeys(("x", "o", "w", "b"), f"*{dtype}") | {"found": "*fp32", "eps": "fp32"}
    assert compiled(getattr(groupnorm, name), fixed, types).asm["cubin"]
