"""Adapters of other packages' kernels: arguments, layouts and mask polarity, by recorded fakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fakes import FakeTorchNPU, FakeTorchXLA, FakeXFormers
from torch import Tensor

import attnproc
from attnproc.kernels import NPU, REFERENCE, XFORMERS, XLA, Kernel, external
from attnproc.types import Bias, Keys, Scoring

pytest_plugins = ("fakes",)

VALID = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
SCORINGS = {
    "plain": Scoring(),
    "scale": Scoring(scale=0.3),
    "keys": Scoring(mask=Keys(VALID)),
    "bias-scale": Scoring(mask=Bias(torch.linspace(-2, 2, 70).view(2, 1, 5, 7)), scale=0.3),
    "bias-per-head": Scoring(mask=Bias(torch.linspace(-2, 2, 28).view(1, 4, 1, 7))),
    "bool": Scoring(mask=Bias(VALID[:, None, None])),
    "causal": Scoring(causal=True),
    "causal-keys": Scoring(causal=True, mask=Keys(VALID)),
}


@pytest.fixture
def fakes(
    fake_xformers: FakeXFormers,
    fake_torch_npu: FakeTorchNPU,
    fake_torch_xla: FakeTorchXLA,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    monkeypatch.setattr(external, "_FLASH_TOKENS", 0)
    return {"xformers": fake_xformers, "npu": fake_torch_npu, "xla": fake_torch_xla}


def _inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((4, 5), (2, 7), (2, 7))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCORINGS)
@pytest.mark.parametrize("kernel", [XFORMERS, NPU, XLA], ids=lambda kernel: kernel.name)
def test_equals_the_reference(
    kernel: Kernel, case: str, dtype: torch.dtype, fakes: dict[str, Any]
) -> None:
    inputs, scoring = _inputs(dtype), SCORINGS[case]
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(kernel(*inputs, scoring), REFERENCE(*inputs, scoring), **tolerance)
    in_torch = kernel is NPU and dtype is torch.float32
    assert len(fakes[kernel.name].calls) == (0 if in_torch else 1)


@pytest.mark.parametrize("kernel", [XFORMERS, NPU, XLA], ids=lambda kernel: kernel.name)
def test_without_the_package_the_call_says_what_to_install(kernel: Kernel) -> None:
    with pytest.raises(ImportError, match="pip install"):
        kernel(*_inputs(torch.bfloat16), Scoring())


@pytest.mark.parametrize("name", [n for n in attnproc.presets.__all__ if "XFormers" in n])
def test_the_operator_can_be_written_later(name: str, fakes: dict[str, Any]) -> None:
    sizes = (True, False, 8) if "Custom" in name else (8,) if "IP" in name else ()
    processor = getattr(attnproc, name)(*sizes)
    assert processor.attention_op is None
    processor.attention_op = "operator"
    assert processor.attention_op == "operator"
    assert processor.recipe.kernel.options == ("operator",)
    assert type(processor).recipe.kernel.options == (None,)
