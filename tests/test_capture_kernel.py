"""The kernel of captured maps, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which is for Linux", allow_module_level=True)

from on_gpu import compiled

from attnproc.kernels.triton import maps

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
