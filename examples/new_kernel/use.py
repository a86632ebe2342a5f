"""Runs the example's kernel without installing it: `python examples/new_kernel/use.py`."""

import sys
from pathlib import Path

import torch

import attnproc
from attnproc.kernels import attention

sys.path.insert(0, str(Path(__file__).parent / "src"))
from attnproc_head_by_head import HEAD_BY_HEAD

attnproc.register_kernel(HEAD_BY_HEAD)

q = torch.randn(2, 4, 16, 8)
valid = torch.arange(16) < torch.tensor([[16], [5]])
got = attention(q, q, q, valid, backend="head_by_head")
print("differs from torch's by", (got - attention(q, q, q, valid)).abs().max().item())

layer = attnproc.Attention(32, heads=4, dim_head=8, processor=attnproc.AttnProcessor2_0())
with attnproc.backend("head_by_head"):
    print("in a layer:", tuple(layer(torch.randn(2, 16, 32)).shape))

try:
    attention(q, q, q, attnproc.Causal(), backend="head_by_head")
except ValueError as error:
    print("refused:", error)
