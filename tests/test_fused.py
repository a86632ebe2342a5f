"""Fused kernels, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

from typing import Any

import pytest
from on_gpu import NEEDS_TRITON, compiled

pytestmark = NEEDS_TRITON


TURNS = {
    "no turn": (False, False, False, 2, 0, 1),
    "pairs, joint": (True, True, True, 2, 128, 1),
    "pairs a head": (True, False, False, 2, 128, 2),
    "halves": (True, False, False, 64, 64, 1),
}


def _pairs() -> list[Any]:
    """Every norm with every form; the slow set has those beside the diagonal."""
    return [
        pytest.param(norm, turn, marks=[] if norm == i else [pytest.mark.slow])
        for norm in range(4)
        for i, turn in enumerate(TURNS)
    ]


@pytest.mark.parametrize("direction", ["_forward", "_backward"])
@pytest.mark.parametrize(("norm", "turn"), _pairs())
def test_the_prologue_compiles_for_a_gpu(direction: str, norm: int, turn: str) -> None:
    from attnproc.kernels.triton import lay

    first, second, joint, width, turned, step = TURNS[turn]
    across = norm in (1, 2) and turn == "pairs, joint"
    how = lay.Lay((norm, norm), (0, 0), across, (first, second), joint, width, turned, step)
    fixed = lay._fixed(how, 24, 128, step == 2)
    types = {"eps0": "fp32", "eps1": "fp32"}
    types |= dict.fromkeys(("x0", "x1", "o", "g", "dx0", "dx1", "w0", "w1", "b0", "b1"), "*bf16")
    types |= dict.fromkeys(("cos", "sin", "dw0", "dw1", "db0", "db1"), "*fp32")
    absent = [] if norm in (1, 2) else ["w0", "w1", "dw0", "dw1"]
    absent += [] if norm == 2 else ["b0", "b1", "db0", "db1"]
    absent += [] if first else ["cos", "sin"]
    assert compiled(getattr(lay, direction), fixed, types, absent).asm["cubin"]


@pytest.mark.parametrize("name", ["_sums", "_apply", "_back_queries", "_back_keys"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_linear_attention_compiles_for_a_gpu(name: str, dtype: str) -> None:
    from attnproc.kernels.triton import linear

    fixed = (*linear._tile(32), 256)
    types = {"eps": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "o", "g", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("state", "total", "d_state", "d_total"), "*fp32")
    assert compiled(getattr(linear, name), fixed, types).asm["cubin"]
