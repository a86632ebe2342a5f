"""Group norm to tokens: interpreted in a process of its own, and compiled for a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_fused import compiled

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux"
)
SUITE = Path(__file__).parent / "groupnorm_suite.py"


def test_the_interpreted_kernels_equal_the_norm() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(SUITE)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=SUITE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("name", "fixed"), [("_moments", (8192,)), ("_normed", (3, 4, 8192, 64))])
def test_they_compile_for_a_gpu(name: str, fixed: tuple[int, ...], dtype: str) -> None:
    from attnproc.kernels.triton import groupnorm

    types = dict.fromkeys(("x", "o", "w", "b"), f"*{dtype}") | {"found": "*fp32", "eps": "fp32"}
    assert compiled(getattr(groupnorm, name), fixed, types).asm["cubin"]
