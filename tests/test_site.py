"""What the line asks the attention module for: settings, layers, and what it has not got."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from attnproc.types import QKV, Call, Site


class OfItsClass(nn.Module):
    scale = 0.5

    @property
    def is_causal(self) -> bool:
        return True


class Forwards(nn.Module):
    """As wrappers do that stand in for a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def held_by(module: nn.Module, name: str, value: Any) -> nn.Module:
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
    return module


def site(attn: Any, compiling: bool) -> Site:
    unused: Any = None
    return Site(unused, unused, attn, Call(torch.zeros(1)), compiling)


NUMBER = torch.tensor(0.5)
HOLDERS = {
    "an attribute": held_by(nn.Module(), "scale", 0.5),
    "a parameter": held_by(nn.Module(), "scale", nn.Parameter(NUMBER)),
    "a buffer": held_by(nn.Module(), "scale", NUMBER),
    "its class": OfItsClass(),
    "what it forwards to": Forwards(OfItsClass()),
    "no module": SimpleNamespace(scale=0.5),
}


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_setting_is_found_wherever_it_is(holder: str, compiling: bool) -> None:
    assert site(HOLDERS[holder], compiling).setting("scale", None) == 0.5


def test_a_property_is_asked() -> None:
    assert site(OfItsClass(), False).setting("is_causal", False) is True


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_is_nowhere_is_the_default(holder: str, compiling: bool) -> None:
    at = site(HOLDERS[holder], compiling)
    assert at.setting("nowhere", 7) == 7
    assert at.held("nowhere") is None


@pytest.mark.parametrize("compiling", [False, True])
def test_layers_are_held(compiling: bool) -> None:
    attn, layer = nn.Module(), nn.Linear(2, 2)
    attn.to_q, attn.norm_q = layer, None
    at = site(attn, compiling)
    assert at.held("to_q") is layer
    assert at.held("norm_q") is None
    assert site(SimpleNamespace(to_q=layer), compiling).held("to_q") is layer


def test_a_setting_that_comes_later_is_seen() -> None:
    attn = nn.Module()
    at = site(attn, False)
    assert at.setting("is_causal", False) is False
    attn.is_causal = True
    assert at.setting("is_causal", False) is True


def test_compiled_code_sees_a_setting_that_comes_later() -> None:
    attn = nn.Module()

    @torch.compile(backend="eager", fullgraph=True)
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * site(attn, True).setting("scale", 1.0)

    x = torch.ones(2)
    assert torch.equal(scaled(x), x)
    attn.scale = 3.0
    assert torch.equal(scaled(x), 3 * x)
    del attn.scale
    attn.register_buffer("scale", torch.tensor(2.0))
    assert torch.equal(scaled(x), 2 * x)


def test_compiled_code_sees_a_layer_that_comes_later() -> None:
    attn = nn.Module()

    @torch.compile(backend="eager", fullgraph=True)
    def normed(x: torch.Tensor) -> torch.Tensor:
        norm = site(attn, True).held("norm_q")
        return x if norm is None else norm(x)

    x = torch.randn(2, 4)
    assert torch.equal(normed(x), x)
    attn.norm_q = nn.LayerNorm(4)
    torch.testing.assert_close(normed(x), attn.norm_q(x))


def test_streams_are_alike_of_one_dtype_and_with_all_parts() -> None:
    x = torch.zeros(1, 2, 4)
    assert QKV(x, x, x).alike
    assert not QKV(x, x, x.half()).alike
    assert not QKV(None, x, x).alike
    assert not QKV(x, None, None).alike
