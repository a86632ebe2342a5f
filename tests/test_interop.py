"""Our processors in a diffusers model and its own back again, to the object and the bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import attnproc
from attnproc.interop import processors

pytest.importorskip("diffusers")

from diffusers.models import attention_processor as theirs
from tiny_models import built, outputs


def unet() -> tuple[nn.Module, dict[str, object]]:
    return built("unet")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def with_image_prompts(model: nn.Module, width: int = 24) -> None:
    """Gives each cross attention an image prompt of diffusers, as its loader does."""
    for path, attn in processors(model):
        if path.endswith("attn2"):
            size = attn.to_q.in_features
            attn.set_processor(theirs.IPAdapterAttnProcessor2_0(size, width, (4,), 0.6))


def test_the_very_processors_come_back() -> None:
    model, _ = unet()
    before, weights = [attn.processor for _, attn in processors(model)], state(model)

    report = attnproc.swap(model)
    swapped = [attn.processor for _, attn in processors(model)]
    count = attnproc.restore(model)

    assert set(report.replaced.values()) == {"AttnProcessor2_0"}
    assert str(report) == f"{len(before)} x AttnProcessor2_0"
    assert all(isinstance(processor, attnproc.AttnProcessor2_0) for processor in swapped)
    assert count == len(before)
    after = [attn.processor for _, attn in processors(model)]
    assert all(one is other for one, other in zip(after, before, strict=True))
    same_state(model, weights)


def prompted(model: nn.Module, inputs: dict[str, object]) -> dict[str, object]:
    """A call with an image's tokens."""
    torch.manual_seed(3)
    tokens = torch.randn(2, 1, 4, 24)
    return {**inputs, "encoder_hidden_states": (inputs["encoder_hidden_states"], [tokens])}


def test_diffusers_sets_the_scale_of_swapped_image_prompts_and_takes_them_off() -> None:
    from diffusers.loaders import IPAdapterMixin

    model, inputs = unet()
    plain = outputs(model, inputs)
    with_image_prompts(model)
    given = prompted(model, inputs)

    class Pipeline(IPAdapterMixin):
        unet = model
        unet_name = "unet"
        safety_checker = None

    def scaled(scale: object) -> torch.Tensor:
        Pipeline().set_ip_adapter_scale(scale)
        return outputs(model, given)

    right = [scaled(0.2), scaled(0.9), scaled({"down": 0.5})]
    attnproc.swap(model)
    found = [scaled(0.2), scaled(0.9), scaled({"down": 0.5})]
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1])

    Pipeline().unload_ip_adapter()
    assert torch.equal(outputs(model, inputs), plain)


def test_diffusers_saves_custom_diffusion_of_swapped_processors(tmp_path: Path) -> None:
    def saved(folder: str, swapped: bool) -> dict[str, object]:
        model, _ = unet()
        torch.manual_seed(1)
        for path, attn in processors(model):
            cross = path.endswith("attn2")
            attn.set_processor(
                theirs.CustomDiffusionAttnProcessor2_0(
                    train_kv=cross,
                    train_q_out=False,
                    hidden_size=attn.to_q.in_features,
                    cross_attention_dim=attn.to_k.in_features if cross else None,
                )
            )
        if swapped:
            attnproc.swap(model)
        model.save_attn_procs(tmp_path / folder, safe_serialization=False)
        file = tmp_path / folder / "pytorch_custom_diffusion_weights.bin"
        return torch.load(file, weights_only=True)

    right, found = saved("theirs", False), saved("ours", True)
    assert len(right) > 1
    torch.testing.assert_close(found, right, rtol=0, atol=0)


def test_swapped_processors_with_weights_are_of_both_classes_in_copies_too() -> None:
    model, inputs = unet()
    with_image_prompts(model)
    attnproc.swap(model)
    given = prompted(model, inputs)
    before = outputs(model, given)
    kinds = attnproc.IPAdapterAttnProcessor2_0, theirs.IPAdapterAttnProcessor2_0

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        procs = [attn.processor for path, attn in processors(copied) if path.endswith("attn2")]
        assert all(isinstance(proc, kind) for proc in procs for kind in kinds)
        assert {type(proc).__name__ for proc in procs} == {"IPAdapterAttnProcessor2_0"}
        assert torch.equal(outputs(copied, given), before)


def test_restore_without_a_swap_does_nothing() -> None:
    model, _ = unet()
    before = [attn.processor for _, attn in processors(model)]
    assert attnproc.restore(model) == 0
    assert [attn.processor for _, attn in processors(model)] == before


def test_a_second_swap_keeps_the_first() -> None:
    model, _ = unet()
    before = [attn.processor for _, attn in processors(model)]
    attnproc.swap(model)

    report = attnproc.swap(model)

    assert not report.replaced
    assert set(report.kept.values()) == {"is of attnproc already"}
    attnproc.restore(model)
    assert [attn.processor for _, attn in processors(model)] == before


def test_a_plain_processor_is_written_over_ours_as_over_diffusers() -> None:
    # Pipelines of diffusers do so (PAG, SAG), and torch refuses it where a module was.
    model, inputs = unet()
    before = outputs(model, inputs)
    attnproc.swap(model)
    ours = dict(model.attn_processors)

    for _, attn in processors(model):
        attn.processor = theirs.AttnProcessor2_0()
    assert torch.equal(outputs(model, inputs), before)

    model.set_attn_processor(ours)
    for _, attn in processors(model):
        attn.processor = theirs.AttnProcessor2_0()


class Foreign(theirs.AttnProcessor2_0):
    """A processor of someone else's."""


def test_the_report_says_what_stays_and_why() -> None:
    model, _ = unet()
    path, attn = next(processors(model))
    attn.set_processor(Foreign())

    report = attnproc.swap(model)

    assert isinstance(attn.processor, Foreign)
    assert report.kept == {path: "attnproc has no Foreign"}
    assert str(report).endswith("\n1 kept: attnproc has no Foreign")


def test_a_model_without_attention() -> None:
    assert str(attnproc.swap(nn.Linear(2, 2))) == "no attention modules"


@pytest.mark.parametrize("name", ["AttnProcessor", "SlicedAttnProcessor"])
def test_other_processors_and_their_settings(name: str) -> None:
    model, inputs = unet()
    kind = getattr(theirs, name)
    model.set_attn_processor(kind(3) if name.startswith("Sliced") else kind())
    before = outputs(model, inputs)

    report = attnproc.swap(model)

    assert set(report.replaced.values()) == {name}
    if name.startswith("Sliced"):
        assert {attn.processor.slice_size for _, attn in processors(model)} == {3}
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=1e-5)


def test_weights_of_image_prompts_are_shared_not_copied() -> None:
    model, inputs = unet()
    with_image_prompts(model)
    inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], [torch.randn(2, 4, 24)])
    before, weights, keys = outputs(model, inputs), state(model), list(model.state_dict())
    old = {path: attn.processor for path, attn in processors(model) if path.endswith("attn2")}

    attnproc.swap(model)

    for path, attn in processors(model):
        if path in old:
            assert attn.processor.to_k_ip[0].weight is old[path].to_k_ip[0].weight
            assert attn.processor.scale == old[path].scale == [0.6]
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=1e-5)

    attnproc.restore(model)
    assert all(a.processor is old[p] for p, a in processors(model) if p in old)
    same_state(model, weights)


def test_training_after_a_swap_trains_the_weights_that_come_back() -> None:
    model, inputs = unet()
    with_image_prompts(model)
    inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], [torch.randn(2, 4, 24)])
    attnproc.swap(model)

    model(**inputs, return_dict=False)[0].sum().backward()
    attnproc.restore(model)

    grads = [a.processor.to_v_ip[0].weight.grad for p, a in processors(model) if "attn2" in p]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_moves_dtypes_and_copies_follow_the_model() -> None:
    model, _ = unet()
    with_image_prompts(model)
    attnproc.swap(model)

    model.to(torch.bfloat16)

    tensors = [
        p for path, a in processors(model) if "attn2" in path for p in a.processor.parameters()
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    attnproc.restore(model)
    dtypes = {p.dtype for _, attn in processors(model) for p in attn.parameters()}
    assert dtypes == {torch.bfloat16}


def test_a_swapped_model_pickles() -> None:
    model, inputs = unet()
    attnproc.swap(model)

    again = pickle.loads(pickle.dumps(model))

    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_capture_in_a_swapped_model_changes_nothing() -> None:
    model, inputs = unet()
    attnproc.swap(model)
    before, swapped = outputs(model, inputs), [attn.processor for _, attn in processors(model)]

    with attnproc.capture(model, words={"third": 2}, part=(0, 1)) as maps:
        inside = outputs(model, inputs)

    assert torch.equal(inside, before)
    assert [attn.processor for _, attn in processors(model)] == swapped
    assert maps["third"].shape == (2, 8, 8)
    assert attnproc.restore(model) == len(swapped)
