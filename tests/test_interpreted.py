"""Fused kernels by Triton's interpreter, each suite in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_gpu import NEEDS_TRITON

pytestmark = NEEDS_TRITON
SUITES = sorted(Path(__file__).parent.glob("*_suite.py"))


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_interpreted_kernels_equal_the_composed_parts(suite: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(suite)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=suite.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:]
