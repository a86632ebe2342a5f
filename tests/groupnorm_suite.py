"""Group norm to tokens through Triton's interpreter; `test_groupnorm` runs this."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, each, some, stand_ins
from spies import spied
from torch import Tensor, nn

from attnproc import AttnProcessor2_0, frame
from attnproc.attention import Attention
from attnproc.kernels import use_fused
from attnproc.kernels.triton import groupnorm
from attnproc.verify.check import check

__all__ = ["stand_ins"]

SHAPES = {
    "tiles": (2, 128, 64, 32),
    "odd": (2, 48, 70, 4),
    "parts": (1, 8, 5000, 2),
    "one token": (3, 6, 1, 2),
    "one group": (2, 12, 1100, 1),
}


def drawn(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> Any:
    """Tokens of a grid far from zero, and a norm of random weights."""
    torch.manual_seed(0)
    batch, channels, length, groups = shape
    x = (torch.randn(batch, channels, length) * 2 + 50).to(dtype)
    norm = nn.GroupNorm(groups, channels, 1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return x.transpose(1, 2), norm.to(dtype)


# Nothing of it matters but that no code is compiled.
SITE: Any = SimpleNamespace(compiling=False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return spied(monkeypatch, groupnorm, "group_norm")


def over_channels(norm: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return frame._over_channels(SITE, norm, x)


@some("affine", (True, False), fast=2)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_normed(shape: str, affine: bool, launches: list[Any]) -> None:
    x, norm = drawn(SHAPES[shape])
    if not affine:
        norm = nn.GroupNorm(norm.num_groups, norm.num_channels, 0.1, affine=False)
    found = over_channels(norm, x)
    assert len(launches) == 1
    assert found.is_contiguous()
    right = norm.double()(x.double().transpose(1, 2)).transpose(1, 2)
    # What rounds is the input itself: 50 and more in float32.
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-7)])
def test_half_precision_is_rounded_once(dtype: torch.dtype, unit: float) -> None:
    # The interpreter cuts bfloat16 off instead of rounding.
    x, norm = drawn(SHAPES["odd"], dtype)
    found = over_channels(norm, x).double()
    right = F.group_norm(
        x.transpose(1, 2).double(), 4, norm.weight.double(), norm.bias.double(), norm.eps
    ).transpose(1, 2)
    error = (found - right).abs() / right.abs().clamp(min=1e-1)
    assert error.max() <= 1.01 * unit


def test_a_batch_may_stand_apart() -> None:
    x, norm = drawn(SHAPES["odd"])
    apart = torch.cat((x.transpose(1, 2), torch.zeros(2, 3, 70)), dim=1)[:, :48].transpose(1, 2)
    assert not apart.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(over_channels(norm, apart), over_channels(norm, x))


CHANGES = (
    "gradients", "hook", "class", "forward", "dtype", "subclass", "tokens", "wide", "autocast",
    "off",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_plain_norm_of_a_grid_goes_the_composed_way(
    change: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(nn.GroupNorm):
        pass

    class Weight(nn.Parameter):
        pass

    x, norm = drawn(SHAPES["odd"])
    called: list[Any] = []
    if change == "hook":
        norm.register_forward_hook(lambda *args: called.append(args))
    if change == "class":
        norm = Own(4, 48)
    if change == "forward":
        norm.forward = lambda x: called.append(x) or x
    if change == "dtype":
        norm.forward = norm.bfloat16().forward
        x = x.bfloat16()
        norm.weight.data = norm.weight.data.float()
        norm.bias.data = norm.bias.data.float()
    if change == "subclass":
        norm.weight = Weight(norm.weight.detach())
    if change == "tokens":
        x = x.contiguous()
    if change == "wide":
        monkeypatch.setattr(groupnorm, "_MOST", 0)
    if change == "off":
        use_fused(False)
    try:
        with (
            torch.set_grad_enabled(change == "gradients"),
            torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
        ):
            frame._over_channels(SITE, norm, x)
    finally:
        use_fused(True)
    assert not launches
    assert len(called) == (change in ("hook", "forward"))


def test_a_layer_of_a_u_net_takes_its_grid_so(launches: list[Any]) -> None:
    torch.manual_seed(0)
    attn = Attention(32, heads=2, dim_head=16, norm_num_groups=4, residual_connection=True)
    attn.processor = AttnProcessor2_0()
    x = torch.randn(2, 32, 5, 3)
    with torch.no_grad():
        found = attn(x)
        assert len(launches) == 1
        use_fused(False)
        try:
            right = attn(x)
        finally:
            use_fused(True)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("stand_ins")
@each((case for case in CASES if case.id.startswith("AttnAddedKVProcessor2_0-")), fast=4)
def test_classes(case: Case, launches: list[Any]) -> None:
    assert not check(case, low=False).failures
    assert launches
