"""Whole diffusers models give the same with our processors and work on as they did."""

from __future__ import annotations

import pytest
import torch

import attnproc

pytest.importorskip("diffusers")

from diffusers.models import attention_processor as theirs
from tiny_models import MODELS, built, outputs

FUSED = {
    "unet": "FusedAttnProcessor2_0",
    "sd3": "FusedJointAttnProcessor2_0",
    "auraflow": "FusedAuraFlowAttnProcessor2_0",
    "cogvideox": "FusedCogVideoXAttnProcessor2_0",
    "hunyuan": "FusedHunyuanAttnProcessor2_0",
    "flux": "FluxAttnProcessor2_0",
}
PERTURBED = {
    "unet": ("PAGIdentitySelfAttnProcessor2_0", "attn1"),
    "hunyuan": ("PAGHunyuanAttnProcessor2_0", "attn1"),
    "sana": ("PAGIdentitySanaLinearAttnProcessor2_0", "attn1"),
    "sd3": ("PAGJointAttnProcessor2_0", "transformer_blocks.1.attn"),
}


def _same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_swap_keeps_the_output_and_restore_undoes_it(name: str) -> None:
    model, inputs = built(name)
    before, weights = outputs(model, inputs), dict(model.state_dict())
    stock = {path: attn.processor for path, attn in attnproc.interop.processors(model)}

    report = attnproc.swap(model)

    assert report.replaced
    assert not report.kept
    assert model.state_dict().keys() == weights.keys()
    _same(outputs(model, inputs), before)
    assert attnproc.restore(model) == len(stock)
    assert all(a.processor is stock[path] for path, a in attnproc.interop.processors(model))
    assert torch.equal(outputs(model, inputs), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_after_a_swap(name: str) -> None:
    model, inputs = built(name)
    before = outputs(model, inputs)
    attnproc.swap(model)

    model.fuse_qkv_projections()
    attnproc.swap(model)

    names = {type(attn.processor).__name__ for _, attn in attnproc.interop.processors(model)}
    assert names == {FUSED[name]}
    _same(outputs(model, inputs), before)
    model.unfuse_qkv_projections()
    _same(outputs(model, inputs), before)


def test_slicing_after_a_swap() -> None:
    model, inputs = built("unet")
    before = outputs(model, inputs)
    attnproc.swap(model)

    model.set_attention_slice(2)
    report = attnproc.swap(model)

    assert set(report.replaced.values()) == {"SlicedAttnProcessor"}
    assert {a.processor.slice_size for _, a in attnproc.interop.processors(model)} == {2}
    _same(outputs(model, inputs), before)


@pytest.mark.parametrize("name", PERTURBED)
def test_guidance_by_perturbation_in_the_model(name: str) -> None:
    model, inputs = built(name)
    kind, layer = PERTURBED[name]
    for path, attn in attnproc.interop.processors(model):
        if path.endswith(layer):
            attn.set_processor(getattr(theirs, kind)())
            # diffusers' perturbed classes drop these norms, ours don't.
            attn.norm_q = attn.norm_k = attn.norm_added_q = attn.norm_added_k = None
    before = outputs(model, inputs)

    report = attnproc.swap(model)

    assert kind in report.replaced.values()
    _same(outputs(model, inputs), before)


def test_image_prompts_loaded_before_a_swap() -> None:
    model, inputs = built("unet")
    processors = {}
    for path, attn in attnproc.interop.processors(model):
        prompted = theirs.IPAdapterAttnProcessor2_0(attn.query_dim, 16, (4, 3), [0.6, 0.4])
        plain = theirs.AttnProcessor2_0()
        processors[f"{path}.processor"] = prompted if attn.is_cross_attention else plain
    model.set_attn_processor(processors)
    prompts = [torch.randn(2, 1, 4, 16), torch.randn(2, 1, 3, 16)]
    mask = torch.rand(1, 1, 64, 64)
    inputs["added_cond_kwargs"] = {"image_embeds": None}
    inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], prompts)
    inputs["cross_attention_kwargs"] = {"ip_adapter_masks": [mask, None]}
    before, weights = outputs(model, inputs), model.state_dict()

    attnproc.swap(model)

    _same(outputs(model, inputs), before)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(value.data_ptr() == after[key].data_ptr() for key, value in weights.items())
    scaled = next(a for _, a in attnproc.interop.processors(model) if a.is_cross_attention)
    assert scaled.processor.scale == [0.6, 0.4]


def test_image_prompts_of_sd3_and_flux_keep_their_weights() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(0)
    sd3, inputs = built("sd3")
    for _, attn in attnproc.interop.processors(sd3):
        attn.set_processor(theirs.SD3IPAdapterJointAttnProcessor2_0(32, 20, 8, 32, scale=0.7))
    inputs["joint_attention_kwargs"] = {
        "ip_hidden_states": torch.randn(2, 4, 20),
        "temb": torch.randn(2, 32),
    }
    flux, flux_inputs = built("flux")
    attn = flux.transformer_blocks[0].attn
    attn.set_processor(FluxIPAdapterAttnProcessor(32, 20, (4, 4), [0.5, 0.7]))
    prompts = [torch.randn(2, 4, 20), torch.randn(2, 4, 20)]
    flux_inputs["joint_attention_kwargs"] = {"ip_hidden_states": prompts}
    for model, keywords in ((sd3, inputs), (flux, flux_inputs)):
        before, weights = outputs(model, keywords), dict(model.state_dict())
        assert not attnproc.swap(model).kept
        _same(outputs(model, keywords), before)
        after = model.state_dict()
        assert after.keys() == weights.keys()
        assert all(after[key].data_ptr() == value.data_ptr() for key, value in weights.items())
