"""Keys and values of prompts by one launch: interpreted in a process apart, compiled for a GPU."""

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
SUITE = Path(__file__).parent / "rows_suite.py"


def test_the_interpreted_kernel_equals_the_layers() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(SUITE)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=SUITE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:]


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
