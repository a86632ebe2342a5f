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


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_interpreted_kernels_equal_the_composed_parts(suite: Path, which: str) -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", which]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(suite)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=suite.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    none = which == "slow" and found.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert found.returncode == 0 or none, found.stdout[-4000:]
