"""Image prompts in one pass, through Triton's interpreter; `test_branches` runs this.

The interpreter can't multiply bfloat16, so half precision is float16 here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, each, some, stand_ins
from spies import spied
from torch import Tensor

from attnproc import IPAdapterAttnProcessor2_0
from attnproc.attention import Attention
from attnproc.kernels import AUTO, SDPA, Kernel, backend, use_fused
from attnproc.kernels.triton import branches
from attnproc.types import Scoring
from attnproc.verify.check import check

__all__ = ["stand_ins"]

B, S, H = 2, 70, 3
WEIGHTS: dict[str, Callable[[], Any]] = {
    "number": lambda: 0.6,
    "one": lambda: 1,
    "tensor": lambda: torch.tensor(0.3),
    "image": lambda: torch.randn(B, 1, 1),
    "mask": lambda: torch.rand(1, S, 1),
    "both": lambda: torch.rand(B, S, 1),
}


def drawn(keys: int, dim: int) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(B, keys, H * dim) for _ in range(2))
    return k, v


def right(q: Tensor, prompts: list[Any], scale: float | None) -> Tensor:
    """The sum in float64."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    total = torch.zeros(q.shape[0], q.shape[2], q.shape[1] * q.shape[3], dtype=torch.float64)
    for *states, weight in prompts:
        k, v = (x.unflatten(2, (q.shape[1], -1)).transpose(1, 2) for x in states)
        shares = (q.double() @ k.double().mT * factor).softmax(dim=-1)
        total += weight * (shares @ v.double()).transpose(1, 2).flatten(2)
    return total


@pytest.mark.parametrize(
    ("dim", "keys", "scale"),
    [
        (40, (5,), None),
        (64, (16, 4), 0.3),
        (12, (1, 70, 257), None),
        (160, (4, 20), None),
        (16, (4, 130, 2, 1), 1),
    ],
)
def test_sums_of_prompts(dim: int, keys: tuple[int, ...], scale: float | None) -> None:
    torch.manual_seed(0)
    q = torch.randn(B, S, H, dim).transpose(1, 2)
    prompts = [(*drawn(n, dim), 0.25 + i) for i, n in enumerate(keys)]
    found = branches.attended(q, prompts, scale)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), right(q, prompts, scale), rtol=1e-5, atol=1e-5)


@some("kind", WEIGHTS, fast=2)
def test_weights(kind: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(B, S, H, 16).transpose(1, 2)
    prompts = [(*drawn(4, 16), 0.5), (*drawn(4, 16), WEIGHTS[kind]())]
    found = branches.attended(q, prompts, None)
    torch.testing.assert_close(found.double(), right(q, prompts, None), rtol=1e-5, atol=1e-5)


def test_views_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    packed = torch.randn(B, S, 3, H, 16)
    images = torch.randn(2, B, 2, 4, H * 16)
    k, v = (states.unbind(1) for states in images)
    prompts = [(*pair, 0.5) for pair in zip(k, v, strict=True)]
    q = packed[:, :, 1].transpose(1, 2)
    found = branches.attended(q, prompts, None)
    torch.testing.assert_close(found.double(), right(q, prompts, None), rtol=1e-5, atol=1e-5)
    flipped = q.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(branches.attended(flipped, prompts, None), found)


def test_a_text_with_its_heads_split() -> None:
    torch.manual_seed(0)
    q = torch.randn(B, S, H, 16).transpose(1, 2)
    k, v = torch.randn(2, B, 9, 2, H, 16)[:, :, :, 1]
    prompts = [(k.flatten(2), v.flatten(2), 1.0), (*drawn(4, 16), 0.5)]
    text = k.transpose(1, 2), v.transpose(1, 2), 1.0
    found = branches.attended(q, [text, *prompts[1:]], None)
    torch.testing.assert_close(found.double(), right(q, prompts, None), rtol=1e-5, atol=1e-5)
    gaps = (*(x.mT.contiguous().mT for x in text[:2]), 1.0)
    torch.testing.assert_close(branches.attended(q, [gaps, *prompts[1:]], None), found)
    assert branches.attended(q, [(k[:, :, :1].transpose(1, 2), text[1][:, :1], 1.0)], None) is None


def test_large_scores_stay_finite_and_half_precision_is_rounded_at_the_end() -> None:
    torch.manual_seed(0)
    q = (40 * torch.randn(B, S, H, 16)).half().transpose(1, 2)
    prompts = [(*(t.half() for t in drawn(n, 16)), 0.5) for n in (20, 4)]
    found = branches.attended(q, prompts, None)
    torch.testing.assert_close(found.double(), right(q, prompts, None), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("what", ["keys", "none", "many", "batch", "heads", "dtype", "weight"])
def test_what_a_launch_does_not_take(what: str) -> None:
    q = torch.randn(B, S, H, 16).transpose(1, 2)
    k, v = drawn(4, 16)
    weight: Any = 1.0
    count = {"none": 0, "many": branches.MOST + 1}.get(what, 1)
    if what == "keys":
        k, v = drawn(513, 16)
    if what == "batch":
        k, v = k[:1], v[:1]
    if what == "heads":
        k, v = k[..., :16], v[..., :16]
    if what == "dtype":
        k, v = k.half(), v.half()
    if what == "weight":
        weight = torch.rand(B, S, H * 16)
    assert branches.attended(q, [(k, v, weight)] * count, None) is None


def prompted(tokens: tuple[int, ...] = (3, 2)) -> tuple[Any, dict[str, Any]]:
    """A layer with image prompts, and a call's inputs."""
    torch.manual_seed(0)
    proc = IPAdapterAttnProcessor2_0(32, 24, tokens, [0.5, 0.25])
    attn = Attention(32, 24, heads=2, dim_head=16, processor=proc).eval()
    states = [torch.randn(B, 1, n, 24) for n in tokens]
    x, text = torch.randn(B, 9, 32), torch.randn(B, 5, 24)
    return attn, {"hidden_states": x, "encoder_hidden_states": (text, states)}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return spied(monkeypatch, branches, "attended")


def test_a_layer_takes_one_launch_and_gives_what_the_composed_way_gives(
    launches: list[Any],
) -> None:
    attn, inputs = prompted()
    with torch.no_grad():
        found = attn(**inputs)
        assert len(launches) == 1
        use_fused(False)
        try:
            other = attn(**inputs)
        finally:
            use_fused(True)
    assert len(launches) == 1
    torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["plain", "mask", "long", "causal", "slicing", "norm"])
def test_the_text_goes_along_where_nothing_comes_in_between(
    text: str, launches: list[Any]
) -> None:
    attn, inputs = prompted()
    if text == "mask":
        inputs["attention_mask"] = torch.zeros(B, 1, 5).masked_fill_(torch.arange(5) > 2, -1e4)
    if text == "long":
        states = inputs["encoder_hidden_states"][1]
        inputs["encoder_hidden_states"] = torch.randn(B, 1025, 24), states
    if text == "causal":
        attn.is_causal = True
    if text == "slicing":
        attn.processor = attn.processor.with_slicing(1)
    if text == "norm":
        attn.norm_q = torch.nn.LayerNorm(16)
    with torch.no_grad():
        found = attn(**inputs)
        use_fused(False)
        try:
            other = attn(**inputs)
        finally:
            use_fused(True)
    torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)
    assert [len(args[1]) for args in launches] == [3 if text == "plain" else 2]


def unscaled(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    return AUTO(q, k, v, scoring)


@pytest.mark.parametrize(
    "wish", ["gradients", "model", "layer", "block", "guard", "recipe", "own", "table"]
)
def test_another_wish_keeps_the_composed_way(
    wish: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attn, inputs = prompted()
    proc = attn.processor
    if wish == "model":
        proc._attention_backend = "sdpa"
    if wish == "layer":
        proc.layer_backend = "math"
    if wish == "recipe":
        attn.processor = proc.but(kernel=SDPA)
    if wish == "own":
        attn.processor = proc.but(kernel=Kernel("auto", unscaled))
    if wish == "table":
        monkeypatch.setattr("attnproc.fused_prompts.is_tuned", lambda device: True)
    with torch.set_grad_enabled(wish == "gradients"):
        if wish == "block":
            with backend("sdpa"):
                attn(**inputs)
        elif wish == "guard":
            with backend("auto", max_error=1.0):
                attn(**inputs)
        else:
            attn(**inputs)
    assert not launches


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_code_takes_one_launch_for_any_weights(
    dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn, inputs = prompted()
    torch._dynamo.reset()
    run = torch.compile(attn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    launches = spied(monkeypatch, branches, "_tensors")
    for scales in ([0.5, 0.25], [1.0, 0.0], [0.7, torch.tensor(0.3)]):
        attn.processor.scale = scales
        with torch.no_grad():
            right = attn(**inputs)
            launches.clear()
            found = run(**inputs)
        # Those of tracing have tensors without memory.
        assert sum(type(args[0]) is Tensor for args in launches) == 1
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


NAMES = ("IPAdapterAttnProcessor2_0-", "FluxIPAdapter")
SOME = [case for case in CASES if case.id.startswith(NAMES)]


@pytest.mark.usefixtures("stand_ins")
@each(SOME[::2], fast=8)
def test_classes(case: Case, launches: list[Any]) -> None:
    assert not check(case, low=False).failures
    assert launches or case.id.endswith("-off")
