"""Products in half precision by float32 blocks: as exact as torch's, where they may be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peak import peak_bytes
from torch import Tensor, nn

from attnproc import widened as module
from attnproc.linears import called
from attnproc.widened import is_slow, widened

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_a_cpu_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_lacks", bool)


def _slow(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tensor(is_slow(x, weight))


def _error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", [(2, 77, 40), (1, 600, 72), (16, 8), (3, 1, 7, 33)])
@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_is_as_exact_as_torch(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(shape[-1], 300, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    y = widened(x, layer.weight, layer.bias)
    assert (y.shape, y.dtype) == (exact.shape, dtype)
    assert _error(y, exact) <= 1.01 * _error(layer(x), exact)


@torch.no_grad()
def test_holds_a_block_of_each_in_float32_and_no_more() -> None:
    x, weight = torch.randn(4096, 320).bfloat16(), torch.randn(640, 320).bfloat16()
    block = 4 * (256 * 320 + 128 * 320 + 256 * 128)
    assert peak_bytes(lambda: widened(x, weight, None)) <= 2 * 4096 * 640 + block


@torch.no_grad()
def test_a_stream_of_a_joint_sequence_and_a_weight_changed_in_place() -> None:
    layer = nn.Linear(32, 48).bfloat16()
    x = torch.randn(2, 90, 32).bfloat16()[:, 50:]
    assert is_slow(x, layer.weight)
    torch.testing.assert_close(called(layer, x, False), layer(x), atol=1e-2, rtol=2e-2)
    layer.weight.data.mul_(2)
    torch.testing.assert_close(called(layer, x, False), layer(x), atol=1e-2, rtol=2e-2)


def test_is_left_to_torch_where_gradients_are_kept_types_differ_or_tokens_are_few() -> None:
    weight = nn.Parameter(torch.randn(8, 8).bfloat16())
    x = torch.randn(64, 8).bfloat16()
    assert not is_slow(x, weight)
    with torch.no_grad():
        assert is_slow(x, weight)
        assert not is_slow(x[:8], weight)
        assert not is_slow(x.float(), weight)
        assert not is_slow(x.half(), weight)
        assert not torch.func.vmap(_slow)(x[None], weight[None]).any()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_slow(x, weight)
