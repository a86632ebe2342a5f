"""Switching an attention module's backend keeps the processor's family, weights and parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from attnproc import attention, families
from attnproc.attention import Attention

if TYPE_CHECKING:
    from fakes import FakeTorchXLA

pytest_plugins = ("fakes",)


@dataclass(frozen=True)
class Sliced:
    size: int


@dataclass(frozen=True)
class Recipe:
    kernel: str | None = "sdpa"
    around: tuple[Any, ...] = ()
    linears: tuple[str, ...] = ()

    def but(self, **changes: Any) -> Recipe:
        return replace(self, **changes)


class Plain:
    """A processor without weights that remembers its constructor arguments."""

    recipe = Recipe()

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options
        if "slice_size" in options:
            self.recipe = Recipe(around=(Sliced(options["slice_size"]),))

    def __call__(self, attn: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class ImagePrompt(nn.Module):
    """A processor with weights and settings."""

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        num_tokens: tuple[int, ...] = (4,),
        scale: float | list[float] = 1.0,
        attention_op: Any = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.cross_attention_dim = hidden_size, cross_attention_dim
        self.num_tokens, self.scale = num_tokens, scale
        self.attention_op = attention_op
        self.to_k_ip = nn.ModuleList([nn.Linear(cross_attention_dim or hidden_size, hidden_size)])


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every preset a stand-in of its name, so that only the choice is tested."""

    def preset(name: str) -> type:
        return type(name, (ImagePrompt if name.startswith("IPAdapter") else Plain,), {})

    monkeypatch.setattr(families, "preset", preset)
    monkeypatch.setattr(attention, "preset", preset)
    monkeypatch.setattr(attention, "find_spec", lambda name: object())


def module(name: str = "AttnProcessor2_0", *args: Any, **options: Any) -> Attention:
    processor = families.preset(name)(*args, **options)
    return Attention(16, heads=4, dim_head=4, processor=processor)


def kind(attn: Attention) -> str:
    return type(attn.processor).__name__


@pytest.mark.parametrize(
    ("before", "sliced", "xformers"),
    [
        ("AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"),
        ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor"),
        (
            "AttnAddedKVProcessor2_0",
            "SlicedAttnAddedKVProcessor",
            "XFormersAttnAddedKVProcessor",
        ),
        ("JointAttnProcessor2_0", None, "XFormersJointAttnProcessor"),
        ("FluxAttnProcessor2_0", None, None),
    ],
)
def test_switches_within_the_family(before: str, sliced: str | None, xformers: str | None) -> None:
    attn = module(before)
    if sliced is None:
        with pytest.raises(ValueError, match=f"{before} has no class for 'sliced'"):
            attn.set_attention_slice(2)
    else:
        attn.set_attention_slice(2)
        assert kind(attn) == sliced
        assert attn.processor.options == {"slice_size": 2}
        attn.set_attention_slice(None)
        assert kind(attn) == before.removesuffix("2_0") + "2_0"

    if xformers is None:
        with pytest.raises(ValueError, match=f"{before} has no class for 'xformers'"):
            attn.set_use_memory_efficient_attention_xformers(True)
    else:
        attn.set_use_memory_efficient_attention_xformers(True, attention_op=("fw", "bw"))
        assert kind(attn) == xformers
        assert attn.processor.options == {"attention_op": ("fw", "bw")}
        attn.set_use_memory_efficient_attention_xformers(False)
        assert kind(attn) == before.removesuffix("2_0") + "2_0"


def test_npu_and_xla(fake_torch_xla: FakeTorchXLA) -> None:
    attn = module()
    attn.set_use_npu_flash_attention(True)
    assert kind(attn) == "AttnProcessorNPU"
    attn.set_use_npu_flash_attention(False)
    assert kind(attn) == "AttnProcessor2_0"
    spec = ("data", None, None, None)
    attn.set_use_xla_flash_attention(True, spec)
    assert kind(attn) == "XLAFlashAttnProcessor2_0"
    assert attn.processor.options == {"partition_spec": spec}
    attn.set_use_xla_flash_attention(False)
    assert kind(attn) == "AttnProcessor2_0"
    attn.set_use_xla_flash_attention(True, spec, is_flux=True)
    assert kind(attn) == "XLAFluxFlashAttnProcessor2_0"
    assert attn.processor.args == (spec,)
    attn.set_use_xla_flash_attention(False)
    assert kind(attn) == "FluxAttnProcessor2_0"


def test_weights_and_settings_move_along() -> None:
    attn = module("IPAdapterAttnProcessor2_0", 16, 12, num_tokens=(4, 16), scale=[0.5])
    attn.processor.to(torch.bfloat16).eval().requires_grad_(False)
    weight = attn.processor.to_k_ip[0].weight
    attn.set_use_memory_efficient_attention_xformers(True, ("fw", "bw"))
    now = attn.processor
    assert kind(attn) == "IPAdapterXFormersAttnProcessor"
    assert now.to_k_ip[0].weight is weight
    assert (now.num_tokens, now.scale, now.cross_attention_dim) == ((4, 16), [0.5], 12)
    assert now.attention_op == ("fw", "bw")
    assert not now.training
    assert "processor.to_k_ip.0.weight" in attn.state_dict()


def test_a_composed_processor_changes_itself() -> None:
    attn = module()
    attn.processor.recipe = Recipe(linears=("lora",))
    with pytest.raises(ValueError, match="no class for 'xformers'"):
        attn.set_use_memory_efficient_attention_xformers(True)

    changed = module().processor
    attn.processor.with_backend = {"xformers": changed}.__getitem__
    attn.set_use_memory_efficient_attention_xformers(True)
    assert attn.processor is changed


def test_an_option_is_not_dropped_in_silence() -> None:
    attn = module()
    attn.processor.recipe = Recipe(linears=("lora",))
    attn.processor.with_backend = lambda name: attn.processor
    with pytest.raises(ValueError, match="with \\['attention_op'\\]"):
        attn.set_use_memory_efficient_attention_xformers(True, ("fw", "bw"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    attn = module()
    for switch, package in (
        (attn.set_use_memory_efficient_attention_xformers, "xformers"),
        (attn.set_use_npu_flash_attention, "torch_npu"),
        (attn.set_use_xla_flash_attention, "torch_xla"),
    ):
        with pytest.raises(ModuleNotFoundError, match=f"{package} is not installed: pip install"):
            switch(True)
    assert kind(attn) == "AttnProcessor2_0"
