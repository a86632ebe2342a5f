"""Attention among few tokens, through Triton's interpreter; `test_interpreted` runs this.

The interpreter can't multiply bfloat16, so half precision is float16 here.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from cases import some
from kernel_cases import check, draw_case
from spies import spied
from torch import Tensor

from attnproc import MochiVaeAttnProcessor2_0
from attnproc.attention import Attention
from attnproc.kernels import SDPA, SHORT, Refused, attention, backend, explain, use_fused
from attnproc.kernels import short as home
from attnproc.kernels.oracle import oracle
from attnproc.kernels.triton import short
from attnproc.types import Causal, Keys


def drawn(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values: rows, heads, those of keys, queries, keys, channels."""
    batch, heads, kv_heads, queries, keys, dim = sizes
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    # Tokens first in memory, as projections leave them.
    return [torch.randn(batch, n, h, dim, dtype=dtype).transpose(1, 2) for h, n in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(3, 2, 2, 28, 28, 96), (2, 4, 2, 16, 16, 40), (5, 1, 1, 1, 1, 8), (2, 6, 1, 64, 64, 64),
     (2, 2, 2, 3, 61, 5), (2, 2, 2, 40, 2, 128)],
)  # fmt: skip
@pytest.mark.parametrize("scale", [None, pytest.param(0.3, marks=pytest.mark.slow)])
def test_values(sizes: tuple[int, ...], causal: bool, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = drawn(*sizes)
    found = short.attended(q, k, v, causal, scale)
    right = oracle(q, k, v, Causal() if causal else None, scale=scale)[0]
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("sizes", "causal", "scale"),
    [
        ((3, 2, 2, 28, 28, 96), True, None),
        ((2, 4, 2, 16, 16, 40), False, 0.3),
        ((2, 3, 1, 1, 1, 8), False, None),
        ((2, 6, 1, 64, 64, 16), True, "learned"),
        ((2, 2, 2, 3, 61, 5), False, "learned"),
        ((2, 2, 2, 40, 2, 128), True, 0.3),
    ],
)
def test_gradients(sizes: tuple[int, ...], causal: bool, scale: Any) -> None:
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in drawn(*sizes)]
    if scale == "learned":
        scale = torch.tensor(0.3, requires_grad=True)
        leaves.append(scale)
    found = attention(*leaves[:3], causal=causal, scale=scale, backend="short")
    right = oracle(*leaves[:3], causal=causal, scale=scale)[0]
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(found.shape).mT.contiguous().mT
    grads = torch.autograd.grad(found, leaves, upstream)
    wanted = torch.autograd.grad(right, leaves, upstream.double())
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


def test_large_scores_stay_finite_and_half_precision_is_rounded_at_the_end() -> None:
    torch.manual_seed(0)
    q, k, v = drawn(2, 3, 3, 17, 17, 32, dtype=torch.float16)
    found = short.attended(40 * q, k, v, False, None)
    right = oracle(40 * q, k, v)[0]
    torch.testing.assert_close(found.double(), right, rtol=2e-3, atol=2e-3)


def test_views_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 3, 2, 16).transpose(1, 3).unbind(2)
    found = short.attended(q, k, v, False, None)
    right = oracle(q, k, v)[0]
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    turned = [t.mT.contiguous().mT for t in (q, k, v)]
    torch.testing.assert_close(attention(*turned, backend="short"), found)


def test_any_call_is_right_or_refused() -> None:
    rng = random.Random(0)
    dtypes = (torch.float32, torch.float16)
    cases = [draw_case(rng.choice, dtypes, size=70, grads=(False,)) for _ in range(900)]
    found = Counter(check(case, SHORT) for case in cases)
    assert found["equal"] > 10
    assert found["refused"] > 5


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(home, "_HEADS", 4)
    return spied(monkeypatch, short, "attended")


def test_many_short_rows_go_there_by_themselves(launches: list[Any]) -> None:
    torch.manual_seed(0)
    q, k, v = drawn(2, 2, 2, 28, 28, 16)
    right = oracle(q, k, v, Causal())[0]
    found = attention(q, k, v, causal=True)
    assert len(launches) == 1
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    assert explain(q, k, v, causal=True).chosen == "short"


@pytest.mark.parametrize(
    "what",
    ["long", "few rows", "mask", "dropout", "autocast", "block", "off", "table", "vmap"],
)  # fmt: skip
def test_other_calls_do_not(
    what: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (2, 1 if what == "few rows" else 2, 1, 28, 65 if what == "long" else 28, 16)
    q, k, v = drawn(*sizes)
    options: dict[str, Any] = {}
    if what == "mask":
        options["mask"] = Keys.first(torch.tensor([5, 9]), 28)
    if what == "dropout":
        options["dropout"] = 0.5
    if what == "table":
        monkeypatch.setattr("attnproc.kernels.plan.tuned", lambda asked: SDPA)
    if what == "block":
        with backend("sdpa"):
            attention(q, k, v)
    elif what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert attention(q, k, v).dtype == torch.bfloat16
    elif what == "off":
        use_fused(False)
        try:
            attention(q, k, v)
            assert explain(q, k, v).chosen == "sdpa"
        finally:
            use_fused(True)
    elif what == "vmap":
        torch.func.vmap(attention)(q[None], k[None], v[None])
    else:
        attention(q, k, v, **options)
    assert not launches


def test_by_name_it_says_what_it_does_not_take() -> None:
    q, k, v = drawn(2, 2, 2, 65, 28, 16)
    with pytest.raises(Refused, match="65 queries and 28 keys: it takes 1 to 64"):
        attention(q, k, v, backend="short")
    q, k, v = drawn(2, 2, 2, 8, 8, 16)
    with pytest.raises(Refused, match="mask keys"):
        attention(q, k, v, Keys.first(torch.tensor([5, 3]), 8), backend="short")


@some("dynamic", (False, True), fast=2)
def test_compiled_code_has_it_too(dynamic: bool, launches: list[Any]) -> None:
    torch.manual_seed(0)
    proc = MochiVaeAttnProcessor2_0()
    attn = Attention(32, heads=2, dim_head=16, processor=proc, residual_connection=True).eval()
    torch._dynamo.reset()
    run = torch.compile(attn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 4):
        x = torch.randn(rows, 7, 32)
        with torch.no_grad():
            right = attn(x)
            launches.clear()
            torch.testing.assert_close(run(x), right, rtol=1e-5, atol=1e-5)
        # Those of tracing have tensors without memory.
        assert launches
        weights = list(attn.parameters())
        grads = torch.autograd.grad(run(x).square().sum(), weights)
        wanted = torch.autograd.grad(attn(x).square().sum(), weights)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
