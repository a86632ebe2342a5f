"""Custom Diffusion's projections as diffusers writes them, read, put on and written back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import attnproc
from attnproc.weights import (
    load_custom_diffusion,
    read_custom_diffusion,
    save_custom_diffusion,
)

pytest.importorskip("diffusers")

from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from tiny_models import built, outputs


def _trained(*, q_out: bool, everywhere: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """A model of diffusers with projections of its own, in cross attention or everywhere."""
    model, inputs = built("unet")
    # diffusers' class can't take a mask.
    del inputs["encoder_attention_mask"]
    torch.manual_seed(4)
    processors = {}
    for path, attn in attnproc.interop.processors(model):
        trains = attn.is_cross_attention or everywhere
        processors[f"{path}.processor"] = CustomDiffusionAttnProcessor2_0(
            train_kv=trains,
            train_q_out=trains and q_out,
            hidden_size=attn.query_dim,
            cross_attention_dim=attn.to_k.in_features,
        )
    model.set_attn_processor(processors)
    return model, inputs


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("q_out", [True, False])
def test_reads_what_diffusers_saves(q_out: bool, safe: bool, tmp_path: Path) -> None:
    theirs, inputs = _trained(q_out=q_out)
    theirs.save_attn_procs(tmp_path, safe_serialization=safe)
    model, _ = built("unet")
    before = outputs(model, inputs)
    read = load_custom_diffusion(model, tmp_path)
    assert len(read.layers) == 4
    torch.testing.assert_close(outputs(model, inputs), outputs(theirs, inputs))
    attnproc.on(model).without("custom_diffusion", missing=True)
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("everywhere", [True, False])
def test_diffusers_reads_what_we_save(everywhere: bool, tmp_path: Path) -> None:
    theirs, inputs = _trained(q_out=True, everywhere=everywhere)
    theirs.save_attn_procs(tmp_path, safe_serialization=False)
    model, _ = built("unet")
    load_custom_diffusion(model, tmp_path)
    name = "ours.safetensors" if everywhere else "ours.bin"
    save_custom_diffusion(model, tmp_path / name)

    again, _ = built("unet")
    pipeline = SimpleNamespace(hf_device_map=None, components={})
    again.load_attn_procs(tmp_path, weight_name=name, _pipeline=pipeline)
    torch.testing.assert_close(outputs(again, inputs), outputs(theirs, inputs))

    swapped, _ = built("unet")
    read = load_custom_diffusion(swapped, tmp_path / name)
    assert read.layers.keys() == read_custom_diffusion(tmp_path, swapped).layers.keys()
    torch.testing.assert_close(outputs(swapped, inputs), outputs(theirs, inputs))


def test_one_error_lists_all() -> None:
    theirs, _ = _trained(q_out=True)
    model, _ = built("unet")
    state = theirs._get_custom_diffusion_state_dict()
    keys = [key for key, value in state.items() if isinstance(value, torch.Tensor)]
    del state[keys[0]]
    state[keys[1]] = state[keys[1]][:, :3]
    state["nowhere.processor.to_k_custom_diffusion.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="does not fit") as error:
        read_custom_diffusion(state, model)
    for part in ("nowhere", "is missing", "shape"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no key"):
        read_custom_diffusion({}, model)
    with pytest.raises(ValueError, match="no projections"):
        save_custom_diffusion(model, "nothing.bin")
