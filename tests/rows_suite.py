"""Keys and values of image prompts by one launch, through Triton's interpreter.

`test_rows` runs this.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, each, stand_ins
from torch import Tensor, nn

from attnproc.fused_prompts import projected
from attnproc.kernels import use_fused
from attnproc.kernels.triton import rows
from attnproc.verify.check import check

__all__ = ["stand_ins"]

C, N = 70, 40
Layers = list[tuple[Any, Any]]


def drawn(
    *tokens: int, bias: bool = False, dtype: Any = torch.float32
) -> tuple[Layers, list[Tensor]]:
    torch.manual_seed(0)
    layers: Layers = [
        (nn.Linear(C, N, bias, dtype=dtype), nn.Linear(C, N, bias, dtype=dtype)) for _ in tokens
    ]
    return layers, [torch.randn(2, n, C, dtype=dtype) for n in tokens]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    plain = rows.pairs_of_products
    monkeypatch.setattr(
        rows, "pairs_of_products", lambda pairs: calls.append(pairs) or plain(pairs)
    )
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(5,), (16, 4), (32, 1), (1, 2, 3, 4)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_products(tokens: tuple[int, ...], bias: bool, dtype: Any, near: float) -> None:
    layers, states = drawn(*tokens, bias=bias, dtype=dtype)
    with torch.no_grad():
        found = projected(layers, states)
        assert found is not None
        for pair, both, x in zip(found, layers, states, strict=True):
            for y, layer in zip(pair, both, strict=True):
                right = layer.double()(x.double())
                torch.testing.assert_close(y.double(), right.flatten(0, 1), rtol=near, atol=near)


def test_states_of_several_images() -> None:
    layers, _ = drawn(3)
    x = torch.randn(2, 3, 4, C)
    with torch.no_grad():
        found = projected(layers, [x])
        assert found is not None
        right = layers[0][1](x).flatten(0, 2)
        torch.testing.assert_close(found[0][1], right, rtol=1e-5, atol=1e-5)


CHANGES = (
    *("gradients", "none", "many", "rows", "apart", "hook", "class", "forward", "subclass"),
    *("bias", "wide", "dtype", "other dtype", "autocast", "off"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_plain_product_goes_the_composed_way(change: str, launches: list[Any]) -> None:
    class Own(nn.Linear):
        pass

    class Weight(nn.Parameter):
        pass

    layers, states = drawn(3, 2)
    key: Any = layers[1][0]
    if change == "none":
        layers, states = [], []
    if change == "many":
        layers, states = drawn(*[1] * (rows.MOST + 1))
    if change == "rows":
        layers, states = drawn(rows.ROWS // 2 + 1)
    if change == "apart":
        states[1] = states[1].transpose(0, 1)
    if change == "hook":
        key.register_forward_hook(lambda *args: None)
    if change == "class":
        layers[1] = Own(C, N, False), layers[1][1]
    if change == "forward":
        key.forward = nn.Identity().forward
    if change == "subclass":
        key.weight = Weight(key.weight.detach())
    if change == "bias":
        layers[1] = nn.Linear(C, N), layers[1][1]
    if change == "wide":
        layers[1] = nn.Linear(C, N + 1, False), nn.Linear(C, N + 1, False)
    if change == "dtype":
        key.half()
    if change == "other dtype":
        layers[1] = layers[1][0].half(), layers[1][1].half()
        states[1] = states[1].half()
    if change == "off":
        use_fused(False)
    try:
        with (
            torch.set_grad_enabled(change == "gradients"),
            torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
        ):
            assert projected(layers, states) is None
    finally:
        use_fused(True)
    assert not launches


NAMES = ("IPAdapterAttnProcessor2_0-", "FluxIPAdapter")


@pytest.mark.usefixtures("stand_ins")
@each([case for case in CASES if case.id.startswith(NAMES)][1::2])
def test_classes(case: Case, launches: list[Any]) -> None:
    assert not check(case, low=False).failures
    assert launches or case.id.endswith("-off")
