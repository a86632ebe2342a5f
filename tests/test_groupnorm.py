"""Group norm to tokens, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from on_gpu import NEEDS_TRITON, compiled

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("name", "fixed"), [("_moments", (8192,)), ("_normed", (3, 4, 8192, 64))])
def test_they_compile_for_a_gpu(name: str, fixed: tuple[int, ...], dtype: str) -> None:
    from attnproc.kernels.triton import groupnorm

    types = dict.fromkeys(("x", "o", "w", "b"), f"*{dtype}") | {"found": "*fp32", "eps": "fp32"}
    assert compiled(getattr(groupnorm, name), fixed, types).asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 768, 1024, 32), (3, 48, 777, 4)], ids=str)
@torch.no_grad()
def test_tokens_are_normed_on_a_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from attnproc.kernels.triton import groupnorm

    torch.manual_seed(0)
    batch, channels, length, groups = shape
    x = torch.randn(batch, channels, length, device="cuda", dtype=dtype) * 2 + 5
    weight, bias = torch.randn(2, channels, device="cuda", dtype=dtype)
    right = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    found = groupnorm.group_norm(x.transpose(1, 2), groups, weight, bias, 1e-5)
    error = (found.double() - right.transpose(1, 2)).norm() / right.norm()
    assert error < (1e-6 if dtype is torch.float32 else 3e-3)
