"""Products of a stream that stands apart in a joint sequence equal those of a copy of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnproc import CogVideoXAttnProcessor2_0, linears
from attnproc.attention import Attention


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streams_with_shared_projections_go_together_on_a_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8, bias=True, out_bias=True)
    attn.processor = CogVideoXAttnProcessor2_0()
    image, text = torch.randn(2, 6, 16), torch.randn(2, 3, 16)
    seen: list[torch.Size] = []
    attn.to_q.register_forward_hook(lambda layer, args, out: seen.append(args[0].shape))
    attn.to(dtype)
    found = attn(image.to(dtype), encoder_hidden_states=text.to(dtype))
    assert seen == [(2, 9, 16)]
    # Of another dtype the text goes by itself, as its products do.
    attn.float()
    with torch.autocast("cpu", torch.bfloat16):
        apart = attn(image, encoder_hidden_states=text.bfloat16())
    assert seen[1:] == [(2, 6, 16), (2, 3, 16)]
    for one, other in zip(apart, found, strict=True):
        torch.testing.assert_close(one.to(dtype), other, rtol=0.05, atol=0.05)
