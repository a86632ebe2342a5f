"""Image prompts in one pass, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_gpu import NEEDS_TRITON, compiled

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize("ones", [(), ("q_token", "token0", "head0", "keys1")])
@pytest.mark.parametrize(
    ("dtype", "size", "dim", "keys", "count"),
    [
        ("bf16", 2, 64, (77, 16, 4), 3),
        ("fp16", 2, 160, (77, 4), 2),
        ("bf16", 2, 40, (257, 257), 2),
        ("fp32", 4, 128, (154, 20), 1),
    ],
)
def test_it_compiles_for_a_gpu(
    dtype: str, size: int, dim: int, keys: tuple[int, ...], count: int, ones: tuple[str, ...]
) -> None:
    from attnproc.kernels.triton import branches

    names = [f"{name}{i}" for i in range(branches.MOST) for name in "kvw"]
    types = dict.fromkeys(("q", "o", *names), f"*{dtype}")
    types |= {"scale": "fp32"} | {f"weight{i}": "fp32" for i in range(branches.MOST)}
    # The first prompt has a number as its weight, the others a map.
    absent = ["w0", *names[3 * count :]]
    fixed = branches._fixed(10, dim, keys, size, 8 if dim % 8 == 0 else 1)
    found = compiled(branches._attend, fixed, types, absent, ones)
    assert found.asm["cubin"]
    # A program's shared memory on an H100.
    assert found.metadata.shared <= 227 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("keys", [(77, 16, 4), (231, 4), (129, 257), (1,)], ids=str)
@pytest.mark.parametrize("dim", [24, 40, 64, 128, 160, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_a_text_and_prompts_on_a_gpu(dtype: torch.dtype, dim: int, keys: tuple[int, ...]) -> None:
    from attnproc.kernels.triton import branches

    torch.manual_seed(0)
    heads, tokens = 3, 333
    q = torch.randn(2, tokens, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
    seen = [torch.randn(2, 2, n, heads, dim, device="cuda", dtype=dtype) for n in keys]
    weights = [1.0, torch.rand(2, tokens, 1, device="cuda", dtype=dtype), 0.6]
    right: Any = 0.0
    for (k, v), weight in zip(seen, weights, strict=False):
        scores = torch.einsum("bhqd,bkhd->bhqk", q.double(), k.double()) * dim**-0.5
        o = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v.double()).flatten(2)
        right = right + weight * o
    (k, v), *others = seen
    text = k.transpose(1, 2), v.transpose(1, 2), 1.0
    prompts = [(*pair.flatten(3), w) for pair, w in zip(others, weights[1:], strict=False)]
    ways = [branches.attended]
    if (dtype, dim) == (torch.bfloat16, 64):
        ways.append(torch.compile(branches.attended, fullgraph=True))
    for way in ways:
        found = way(q, [text, *prompts], None)
        error = (found.double() - right).norm() / right.norm()
        assert error < (1e-5 if dtype is torch.float32 else 4e-3)
