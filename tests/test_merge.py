"""The kernel that merges a ring's parts: interpreted in a process of its own, and compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from attnproc.parallel.ring import merged

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux"
)


def parts_equal_the_whole(dtype: torch.dtype, total: torch.dtype, by_token: bool) -> None:
    """The kernel, in whatever order of memory, against the plain form."""
    from attnproc.kernels.triton.merge import merge

    torch.manual_seed(0)
    shape = (2, 45, 3, 24) if by_token else (2, 3, 45, 24)
    one, other = torch.randn(2, *shape).to(dtype)
    if by_token:
        one, other = one.transpose(1, 2), other.transpose(1, 2)
    lse, of_other = torch.randn(2, *one.shape[:3]) * 5
    # In float64 by the plain form.
    wide = (t.double() for t in (one, lse, other, of_other))
    want = [t.float() for t in merged(*wide, torch.float64, torch.float64)]

    had = one.clone(memory_format=torch.preserve_format), lse.clone()
    o, of_both = merge(*had, other, of_other, total)

    assert (o is had[0]) == (dtype == total)
    assert o.dtype == total
    assert o.stride() == one.stride()
    torch.testing.assert_close(of_both, want[1])
    exact = total == torch.float32 and dtype == torch.float32
    near = 1e-6 if exact else 2e-3
    torch.testing.assert_close(o.float(), want[0], rtol=near, atol=near)


def test_the_interpreted_kernel_equals_the_plain_form() -> None:
    code = (
        "import torch; from test_merge import parts_equal_the_whole as run\n"
        "wide, half = torch.float32, torch.float16\n"
        "for kinds in ((wide, wide), (half, half), (half, wide)):\n"
        "    for by_token in (True, False): run(*kinds, by_token)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]


@pytest.mark.parametrize("out", ["bf16", "fp32"])
def test_the_kernel_compiles_for_a_gpu(out: str) -> None:
    from on_gpu import compiled

    from attnproc.kernels.triton import merge

    types = {"one": f"*{out}", "out": f"*{out}", "other": "*bf16"}
    types |= dict.fromkeys(("lse", "of_other"), "*fp32")
    assert compiled(merge._merge, (24, 128, 128, merge._TOKENS), types).asm["cubin"]
