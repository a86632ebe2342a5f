"""Switching an attention module's backend keeps the processor's family, weights and parts."""

from __future__ import annotations

import importlib.machinery
from typing import TYPE_CHECKING, Any

import pytest
import torch

import attnproc
from attnproc import attention, families
from attnproc.attention import Attention
from attnproc.kernels import AUTO, NPU, REFERENCE, XFORMERS, XLA
from attnproc.kernels.around import Perturbed, Sliced

if TYPE_CHECKING:
    from fakes import FakeTorchNPU, FakeTorchXLA, FakeXFormers

pytest_plugins = ("fakes",)

OPERATORS = ("forward", "backward")


@pytest.fixture(autouse=True)
def all_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets switches find every package; what runs one takes its fake as well."""
    spec = importlib.machinery.ModuleSpec("any", loader=None)
    monkeypatch.setattr(attention, "find_spec", lambda name: spec)


def module(name: str = "AttnProcessor2_0", *args: Any, **options: Any) -> Attention:
    processor = getattr(attnproc, name)(*args, **options)
    return Attention(16, heads=4, dim_head=4, processor=processor)


def kind(attn: Attention) -> str:
    return type(attn.processor).__name__


def test_every_preset_exists() -> None:
    for family in families.FAMILIES:
        for name in (*family.presets.values(), *family.others):
            assert isinstance(families.preset(name), type)


@pytest.mark.parametrize(
    ("before", "sliced", "xformers", "after"),
    [
        ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor", "AttnProcessor2_0"),
        ("AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor", "AttnProcessor2_0"),
        (
            "AttnAddedKVProcessor",
            "SlicedAttnAddedKVProcessor",
            "XFormersAttnAddedKVProcessor",
            "AttnAddedKVProcessor2_0",
        ),
    ],
)
def test_switches_within_the_family(before: str, sliced: str, xformers: str, after: str) -> None:
    attn = module(before)
    attn.set_attention_slice(2)
    assert kind(attn) == sliced
    assert attn.processor.slice_size == 2
    attn.set_attention_slice(None)
    assert kind(attn) == after
    attn.set_use_memory_efficient_attention_xformers(True, attention_op=OPERATORS)
    assert kind(attn) == xformers
    assert attn.processor.attention_op == OPERATORS
    attn.set_use_memory_efficient_attention_xformers(False)
    assert kind(attn) == after


def test_npu_and_xla() -> None:
    attn = module()
    attn.set_use_npu_flash_attention(True)
    assert kind(attn) == "AttnProcessorNPU"
    attn.set_use_npu_flash_attention(False)
    assert kind(attn) == "AttnProcessor2_0"
    spec = ("data", None, None, None)
    attn.set_use_xla_flash_attention(True, spec)
    assert kind(attn) == "XLAFlashAttnProcessor2_0"
    assert attn.processor.partition_spec == spec
    attn.set_use_xla_flash_attention(False)
    assert kind(attn) == "AttnProcessor2_0"
    attn.set_use_xla_flash_attention(True, spec, is_flux=True)
    assert kind(attn) == "XLAFluxFlashAttnProcessor2_0"
    assert attn.processor.partition_spec == spec
    attn.set_use_xla_flash_attention(False)
    assert kind(attn) == "FluxAttnProcessor2_0"


def test_weights_and_settings_move_along() -> None:
    attn = module("IPAdapterAttnProcessor2_0", 16, 12, num_tokens=(4, 16), scale=[0.5, 0.25])
    attn.processor.to(torch.bfloat16).eval().requires_grad_(False)
    weight = attn.processor.to_k_ip[0].weight
    keys = list(attn.state_dict())
    attn.set_use_memory_efficient_attention_xformers(True, OPERATORS)
    now = attn.processor
    assert kind(attn) == "IPAdapterXFormersAttnProcessor"
    assert now.to_k_ip[0].weight is weight
    assert list(now.num_tokens) == [4, 16]
    assert list(now.scale) == [0.5, 0.25]
    assert now.attention_op == OPERATORS
    assert not now.training
    assert list(attn.state_dict()) == keys

    attn.set_attention_slice(2)
    assert attn.processor.to_k_ip[0].weight is weight
    assert attn.processor.recipe.around == (Sliced(2),)


def test_custom_diffusion_keeps_its_weights() -> None:
    attn = module("CustomDiffusionAttnProcessor", True, True, 16, 16)
    weight = attn.processor.to_k_custom_diffusion.weight
    attn.set_use_memory_efficient_attention_xformers(True)
    assert kind(attn) == "CustomDiffusionXFormersAttnProcessor"
    assert attn.processor.to_k_custom_diffusion.weight is weight
    attn.set_use_memory_efficient_attention_xformers(False)
    assert kind(attn) == "CustomDiffusionAttnProcessor2_0"
    assert attn.processor.train_q_out


@pytest.mark.parametrize(
    "before",
    ["PAGIdentitySelfAttnProcessor2_0", "AuraFlowAttnProcessor2_0", "HunyuanAttnProcessor2_0"],
)
def test_other_families_change_their_parts(before: str) -> None:
    attn = module(before)
    around = attn.processor.recipe.around
    attn.processor._attention_backend = "flash_sdpa"
    attn.set_attention_slice(2)
    assert attn.processor.recipe.around == (*around, Sliced(2))
    assert attn.processor.recipe.kernel == AUTO
    for switch, kernel in (
        (attn.set_use_memory_efficient_attention_xformers, XFORMERS),
        (attn.set_use_npu_flash_attention, NPU),
        (attn.set_use_xla_flash_attention, XLA),
    ):
        switch(True)
        assert kind(attn) == before
        assert attn.processor.recipe.kernel == kernel
        assert attn.processor.recipe.around == around
        assert attn.processor._attention_backend is None
        switch(False)
        assert attn.processor.recipe.kernel == AUTO


def test_a_composed_processor_keeps_its_parts() -> None:
    attn = module()
    attn.processor = attn.processor.but(around=(Perturbed(2),), kernel=REFERENCE)
    attn.set_use_memory_efficient_attention_xformers(True, OPERATORS)
    assert attn.processor.recipe.around == (Perturbed(2),)
    assert attn.processor.recipe.kernel.options == (OPERATORS,)


def test_linear_attention_stays_linear() -> None:
    attn = module("SanaLinearAttnProcessor2_0")
    with pytest.raises(ValueError, match="SanaLinearAttnProcessor2_0 can't run on 'xformers'"):
        attn.set_use_memory_efficient_attention_xformers(True)


def test_a_foreign_processor_is_refused() -> None:
    attn = module()
    attn.processor = lambda attn, hidden_states, **_: hidden_states
    with pytest.raises(ValueError, match="function can't run on 'sliced'; possible for it are"):
        attn.set_attention_slice(2)


@pytest.mark.parametrize("before", ["AttnProcessor2_0", "PAGIdentitySelfAttnProcessor2_0"])
def test_switched_computes_the_same(before: str, fake_xformers: FakeXFormers) -> None:
    attn, x = module(before), torch.randn(4, 8, 16)
    expected = attn(x)
    attn.set_attention_slice(3)
    torch.testing.assert_close(attn(x), expected)
    attn.set_use_memory_efficient_attention_xformers(True)
    torch.testing.assert_close(attn(x), expected)
    assert fake_xformers.calls


def test_switched_to_npu_and_xla_computes_the_same(
    fake_torch_npu: FakeTorchNPU, fake_torch_xla: FakeTorchXLA
) -> None:
    attn, x = module(), torch.randn(2, 8, 16)
    expected = attn(x)
    attn.set_use_npu_flash_attention(True)
    torch.testing.assert_close(attn(x), expected)
    attn.set_use_xla_flash_attention(True)
    torch.testing.assert_close(attn(x), expected)


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
