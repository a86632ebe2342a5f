"""Fused kernels: interpreted in a process of its own, and compiled for a GPU without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux"
)
SUITE = Path(__file__).parent / "fused_suite.py"


def test_the_interpreted_kernels_equal_the_composed_parts() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(SUITE)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=SUITE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:]


def compiled(
    launcher: Any,
    fixed: tuple[Any, ...],
    types: dict[str, str],
    absent: Sequence[str] = (),
    ones: Sequence[str] = (),
) -> Any:
    """The kernel's binary for an H100, made here.

    Triton compiles a pointer that is absent and a number that is one as constants.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launcher.kernel
    names = kernel.arg_names
    # Arguments of compilation are the last ones.
    constants = dict(zip(names[-len(fixed) :], fixed, strict=True)) | dict.fromkeys(absent)
    constants |= dict.fromkeys(ones, 1)
    constants = {name: constants[name] for name in names if name in constants}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    return compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))


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

    fixed = (*linear._tile(32), 256) if name == "_sums" else (*linear._tile(32), 256, 2)
    types = {"eps": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "o", "g", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("state", "total", "d_state", "d_total"), "*fp32")
    assert compiled(getattr(linear, name), fixed, types).asm["cubin"]
