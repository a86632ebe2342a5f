"""The kernel of captured maps: interpreted in a process of its own, and compiled for a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which is for Linux", allow_module_level=True)

from test_fused import compiled

from attnproc.kernels.triton import maps

SUITE = Path(__file__).parent / "capture_suite.py"


def test_the_interpreted_kernel_equals_plain_attention() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(SUITE)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=SUITE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:]


# Keys, channels and labels: SDXL's, all of its words, Stable Diffusion's deepest layers.
SIZES = {"bf16": [(77, 64, 10), (77, 64, 77), (77, 160, 1)], "fp32": [(77, 64, 10)]}


@pytest.mark.parametrize("mask", [None, "*i1", "*fp16"])
@pytest.mark.parametrize("dtype", SIZES)
def test_it_compiles_for_a_gpu(dtype: str, mask: str | None) -> None:
    bytes_of = 4 if dtype == "fp32" else 2
    for keys, dim, labels in SIZES[dtype]:
        assert maps.fits(keys, dim, labels, bytes_of)
        sizes = maps._fixed(20, 20, keys, dim, labels, bytes_of)
        types = {"q": f"*{dtype}", "k": f"*{dtype}", "choice": "*fp32", "o": "*fp32"}
        types |= {"scale": "fp32"} | ({} if mask is None else {"mask": mask})
        absent = ["mask"] if mask is None else []
        binary = compiled(maps._maps, (mask == "*i1", True, *sizes), types, absent)
        assert binary.asm["cubin"]
        # What a multiprocessor has at least, since compute capability 8.6.
        assert binary.metadata.shared <= 99 << 10


def test_what_a_program_cannot_hold() -> None:
    assert not maps.fits(77, 160, 10, 4)
    assert not maps.fits(600, 64, 10, 2)
    assert not maps.fits(255, 64, 255, 2)
