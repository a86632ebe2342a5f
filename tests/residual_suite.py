"""The residual of a grid through Triton's interpreter; `test_interpreted` runs this."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spies import spied
from torch import Tensor

from attnproc import AttnAddedKVProcessor2_0, AttnProcessor2_0
from attnproc.attention import Attention
from attnproc.fused_grid import plus
from attnproc.kernels import use_fused
from attnproc.kernels.triton import residual
from attnproc.shapes import to_grid

SHAPES = {"tiles": (2, 128, 8, 8), "odd": (3, 70, 5, 13), "row": (1, 66, 1, 129)}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return spied(monkeypatch, residual, "tokens_plus_grid")


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An image of tokens that is seen as a grid, and a grid."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    tokens = torch.randn(shape[0], x[0, 0].numel(), shape[1]).to(dtype)
    return to_grid(tokens, x), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_torch_s_to_the_bit(
    shape: str, dtype: torch.dtype, launches: list[Any]
) -> None:
    image, x = drawn(SHAPES[shape], dtype)
    with torch.no_grad():
        found = plus(image, x)
    assert len(launches) == 1
    right = image + x
    assert torch.equal(found, right)
    assert found.stride() == right.stride()


@pytest.mark.parametrize(
    "change",
    ["gradients", "off", "dtype", "grids", "tokens", "broadcast", "subclass", "line"],
)
def test_anything_else_goes_the_composed_way(change: str, launches: list[Any]) -> None:
    class Own(Tensor):
        pass

    image, x = drawn(SHAPES["odd"])
    if change == "dtype":
        x = x.half()
    if change == "grids":
        image = image.contiguous()
    if change == "tokens":
        x = to_grid(x.flatten(2).transpose(1, 2).contiguous(), x)
    if change == "broadcast":
        x = x[:1]
    if change == "line":
        image, x = image.flatten(2), x.flatten(2)
    if change == "subclass":
        x = x.as_subclass(Own)
    use_fused(change != "off")
    try:
        with torch.set_grad_enabled(change == "gradients"):
            found = plus(image, x)
    finally:
        use_fused(True)
    assert not launches
    assert torch.equal(found, image + x)


@pytest.mark.parametrize("added", [False, True])
def test_layers_of_u_nets_take_it(added: bool, launches: list[Any]) -> None:
    torch.manual_seed(0)
    more: Any = {"added_kv_proj_dim": 24, "only_cross_attention": False} if added else {}
    attn = Attention(
        32, heads=2, dim_head=16, norm_num_groups=4, residual_connection=True, bias=True, **more
    )
    attn.processor = AttnAddedKVProcessor2_0() if added else AttnProcessor2_0()
    inputs: Any = {"encoder_hidden_states": torch.randn(2, 7, 24)} if added else {}
    x = torch.randn(2, 32, 5, 3)
    with torch.no_grad():
        found = attn(x, **inputs)
        assert len(launches) == 1
        use_fused(False)
        try:
            right = attn(x, **inputs)
        finally:
            use_fused(True)
    assert len(launches) == 1
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
