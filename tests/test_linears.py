"""Products of a stream that stands apart in a joint sequence equal those of a copy of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnproc import linears


def apart(batch: int = 2, tokens: int = 6, channels: int = 8) -> Tensor:
    """The second of two streams of one sequence."""
    return torch.randn(batch, tokens + 3, channels)[:, 3:]


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_layer(
    by_rows: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def goes_by_rows(x: Tensor, weight: Tensor) -> bool:
        return by_rows

    monkeypatch.setattr(linears, "_goes_by_rows", goes_by_rows)
    layer, x = nn.Linear(8, 5, bias), apart()
    with torch.no_grad():
        torch.testing.assert_close(linears.called(layer, x, False), layer(x))


def test_gradients_are_those_of_the_layer() -> None:
    layer = nn.Linear(8, 5)
    x = apart().requires_grad_()
    found = torch.autograd.grad(
        linears.called(layer, x, False).square().sum(), (x, *layer.parameters())
    )
    right = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    for some, others in zip(found, right, strict=True):
        torch.testing.assert_close(some, others)


def test_autocast_reaches_the_product() -> None:
    layer, x = nn.Linear(8, 5), apart()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linears.called(layer, x, False).dtype == layer(x).dtype == torch.bfloat16


def test_a_layer_whose_weight_is_an_attribute_is_called() -> None:
    # As sharded training holds it.
    layer, x = nn.Linear(8, 5), torch.randn(2, 3, 8)
    right = layer(x)
    weight, bias = layer.weight.data, layer.bias.data
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(linears.called(layer, x, False), right)
