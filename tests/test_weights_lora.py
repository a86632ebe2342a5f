"""Low-rank updates as diffusers, PEFT and kohya save them, read, put on and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnproc
from attnproc.weights import LoRAFile, load_lora, read_lora, save_lora

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import peft
import safetensors.torch as safetensors
from diffusers.utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from tiny_models import built, outputs

PIPELINES = {
    "unet": diffusers.StableDiffusionPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
}
COMPONENT = {"unet": "unet", "sd3": "transformer", "flux": "transformer"}
ADDED = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
each_model = pytest.mark.parametrize("name", PIPELINES)


def _same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


def _adapted(name: str, **changes: Any) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A model with PEFT's updates, a call and what comes out."""
    model, inputs = built(name)
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "init_lora_weights": False,
        "target_modules": TARGETS + (ADDED if name != "unet" else []),
        "alpha_pattern": {"to_q": 2},
        "rank_pattern": {"to_k": 4},
    }
    model.add_adapter(peft.LoraConfig(**{**settings, **changes}), "given")
    return model, inputs, outputs(model, inputs)


def _ours(name: str, file: Any, **options: Any) -> tuple[nn.Module, Tensor, LoRAFile]:
    model, inputs = built(name)
    read = load_lora(model, file, **options)
    return model, outputs(model, inputs), read


@each_model
def test_reads_what_diffusers_saves(name: str, tmp_path: Path) -> None:
    model, _, theirs = _adapted(name)
    component = COMPONENT[name]
    model.save_lora_adapter(tmp_path / "adapter", "given")
    PIPELINES[name].save_lora_weights(
        tmp_path / "pipeline",
        **{
            f"{component}_lora_layers": get_peft_model_state_dict(model, adapter_name="given"),
            f"{component}_lora_adapter_metadata": model.peft_config["given"].to_dict(),
        },
    )
    for folder in ("adapter", "pipeline"):
        ours, out, read = _ours(name, tmp_path / folder)
        _same(out, theirs)
        assert read.layout == "diffusers"
        assert not read.skipped
        assert set(read.layers) == {path for path, _ in attnproc.interop.processors(ours)}


def test_reads_what_peft_saves(tmp_path: Path) -> None:
    base, inputs = built("unet")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, use_rslora=True
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    _, out, read = _ours("unet", tmp_path)
    _same(out, outputs(model, inputs))
    assert read.layout == "peft"

    loose = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    model, inputs = built("unet")
    load_lora(model, read_lora(loose, model, settings))
    assert torch.equal(outputs(model, inputs), out)


@each_model
def test_reads_kohyas_layout_by_diffusers_names(name: str) -> None:
    model, _, theirs = _adapted(name)
    state = get_peft_model_state_dict(model, adapter_name="given")
    prefix = "lora_unet" if name == "unet" else "lora_transformer"
    kohya = {
        key.replace("base_model_model", prefix): value
        for key, value in convert_state_dict_to_kohya(
            {f"base_model.model.{k}": v for k, v in state.items()}
        ).items()
        if not key.endswith(".alpha")
    }
    for key in [k for k in kohya if "lora_down" in k]:
        alpha = 2.0 if "to_q" in key else 5.0
        kohya[key.replace("lora_down.weight", "alpha")] = torch.tensor(alpha)
    _, out, read = _ours(name, kohya)
    _same(out, theirs)
    assert read.layout == "kohya"


def test_reads_attention_processors_of_old(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, inputs = built("unet")
    old = {}
    for path, attn in attnproc.interop.processors(model):
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            layer = getattr(attn, projection)
            layer = layer[0] if projection == "to_out" else layer
            stem = f"unet.{path}.processor.{projection}_lora"
            old[f"{stem}.down.weight"] = torch.randn(2, layer.in_features)
            old[f"{stem}.up.weight"] = torch.randn(layer.out_features, 2)
    torch.save(old, tmp_path / "old.bin")
    _, out, read = _ours("unet", tmp_path / "old.bin")
    model.load_lora_adapter(dict(old), prefix="unet")
    _same(out, outputs(model, inputs))
    assert read.layout == "attn_procs"


def _by_diffusers(name: str, file: Path) -> Tensor:
    """What diffusers' own loader makes of a file."""
    model, inputs = built(name)
    pipeline, component = PIPELINES[name], COMPONENT[name]
    options = {"unet_config": model.config} if name == "unet" else {}
    if name == "flux":
        options["return_alphas"] = True
    state, *alphas, metadata = pipeline.lora_state_dict(
        file.parent, weight_name=file.name, return_lora_metadata=True, **options
    )
    options = {"network_alphas": alphas[0]} if alphas else {}
    put = getattr(pipeline, f"load_lora_into_{component}")
    put(state, metadata=metadata, **options, **{component: model})
    return outputs(model, inputs)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@each_model
def test_diffusers_reads_what_we_save(name: str, layout: str, tmp_path: Path) -> None:
    given, _, _ = _adapted(name)
    if layout == "kohya" and name == "sd3":
        pytest.skip("kohya's layout is written for U-Nets and Flux")
    given.save_lora_adapter(tmp_path, "given")
    model, inputs = built(name)
    read = read_lora(tmp_path, model)
    if layout == "kohya" and name == "flux":
        # diffusers takes the rows of these layers to be 3072 and 12288.
        read.layers.pop("single_transformer_blocks.0.attn")
    load_lora(model, read)
    out = outputs(model, inputs)

    save_lora(model, tmp_path / "ours.safetensors", layout=layout)

    _same(_by_diffusers(name, tmp_path / "ours.safetensors"), out)
    _, out_again, _ = _ours(name, tmp_path / "ours.safetensors")
    _same(out_again, out)


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_peft_reads_what_we_save(name: str, tmp_path: Path) -> None:
    _adapted(name)[0].save_lora_adapter(tmp_path / "given", "given")
    model, out, read = _ours(name, tmp_path / "given")
    save_lora(model, tmp_path / "ours", layout="peft")
    base, inputs = built(name)
    _same(outputs(peft.PeftModel.from_pretrained(base, tmp_path / "ours"), inputs), out)
    again = read_lora(tmp_path / "ours", built(name)[0])
    for path, updates in read.layers.items():
        for projection, weights in updates.items():
            ours = again.layers[path][projection]
            assert torch.equal(ours.down, weights.down)
            assert torch.equal(ours.up, weights.up)
            assert ours.factor == weights.factor


def test_put_on_with_a_weight_and_taken_off() -> None:
    model, inputs, theirs = _adapted("unet")
    state = get_peft_model_state_dict(model, adapter_name="given")
    plain, inputs = built("unet")
    base = outputs(plain, inputs)
    settings = {"lora_alpha": 5, "alpha_pattern": {"to_q": 2}}
    read = read_lora(state, plain, settings)
    load_lora(plain, read, "style", weight=0.0)
    assert torch.equal(outputs(plain, inputs), base)
    attnproc.on(plain).scale("style", 0.5)
    load_lora(plain, read, "more", weight=0.5)
    _same(outputs(plain, inputs), theirs)
    attnproc.on(plain).without("style").without("more")
    assert torch.equal(outputs(plain, inputs), base)
    assert plain.state_dict().keys() == built("unet")[0].state_dict().keys()


def test_what_is_outside_attention_is_reported() -> None:
    targets = [*TARGETS, "ff.net.2", "proj_in", "conv1", "linear_1"]
    model, _, _ = _adapted("unet", target_modules=targets)
    state = {
        f"unet.{k}": v for k, v in get_peft_model_state_dict(model, adapter_name="given").items()
    }
    state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(
        2, 2
    )
    read = read_lora(state, built("unet")[0])
    assert set(read.skipped.values()) == {"outside attention", "of a text encoder"}
    assert len(read.skipped) + 2 * sum(map(len, read.layers.values())) == len(state)
    assert "keys skipped: outside attention" in str(read)


def test_one_error_lists_all() -> None:
    model, _, _ = _adapted("unet")
    good = get_peft_model_state_dict(model, adapter_name="given")
    state = dict(good)
    names = list(state)
    shape, gone = names[0], names[3]
    state[shape] = state[shape][:, :-1]
    del state[gone]
    state["down_blocks.7.attentions.0.to_q.lora_A.weight"] = torch.ones(2, 2)
    dora = names[8].replace("lora_A.weight", "lora_magnitude_vector")
    state[dora] = torch.ones(2)
    state["mid.hello"] = torch.ones(2)
    with pytest.raises(ValueError, match="does not fit") as error:
        read_lora(state, built("unet")[0])
    for part in ("down_blocks.7", "lora_magnitude_vector is not supported", "mid.hello"):
        assert part in str(error.value)

    wrong = {**good, shape: good[shape][:, :-1]}
    del wrong[gone]
    with pytest.raises(ValueError, match="does not fit") as error:
        read_lora(wrong, built("unet")[0])
    assert f"{shape}: shape" in str(error.value)
    assert "matrix is missing" in str(error.value)
    with pytest.raises(ValueError, match="no key"):
        read_lora({}, built("unet")[0])


def test_flux_layers_with_q_k_v_in_one(tmp_path: Path) -> None:
    """The layouts of kohya and XLabs, as diffusers' loader reads them."""
    torch.manual_seed(3)
    model, _ = built("flux")
    width, rank = model.transformer_blocks[0].attn.to_q.in_features, 2
    rows = {"qkv": 3 * width, "proj": width}
    kohya, xlabs = {}, {}
    for number, stream in enumerate(("img", "txt"), 1):
        for layer, out in rows.items():
            down, up = torch.randn(rank, width), torch.randn(out, rank)
            stem = f"lora_unet_double_blocks_0_{stream}_attn_{layer}"
            kohya |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            kohya[f"{stem}.alpha"] = torch.tensor(1.0)
            stem = f"double_blocks.0.processor.{layer}_lora{number}"
            xlabs |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    for layout, state in (("kohya", kohya), ("xlabs", xlabs)):
        safetensors.save_file(state, tmp_path / f"{layout}.safetensors")
        _, out, read = _ours("flux", tmp_path / f"{layout}.safetensors")
        assert read.layout == layout
        _same(out, _by_diffusers("flux", tmp_path / f"{layout}.safetensors"))


def test_flux_single_blocks_share_a_layer_with_their_mlp() -> None:
    model, _ = built("flux")
    block = model.single_transformer_blocks[0]
    width, mlp = block.attn.to_q.in_features, block.proj_mlp.out_features
    stem = "lora_unet_single_blocks_0_linear1"
    down, up = torch.randn(2, width), torch.randn(3 * width + mlp, 2)
    read = read_lora({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, model)
    (updates,) = read.layers.values()
    assert torch.equal(updates["to_v"].up, up[2 * width : 3 * width])
    assert "outside attention" in next(iter(read.skipped.values()))


SIZES = {
    "sd15": ("UNet2DConditionModel", {"cross_attention_dim": 768}, 32),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        140,
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}, 57),
    "sd3": ("SD3Transformer2DModel", {"num_layers": 24}, 24),
}


def _sized(name: str) -> tuple[nn.Module, int]:
    kind, changes, count = SIZES[name]
    with torch.device("meta"):
        return getattr(diffusers, kind)(**changes), count


def _whole_kohya(model: nn.Module) -> dict[str, Tensor]:
    """Every linear layer and convolution of a model under kohya's names, with rank 1."""
    state = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            stem = f"lora_unet_{path.replace('.', '_')}"
            shape = module.weight.shape
            state[f"{stem}.lora_down.weight"] = torch.empty(1, *shape[1:], device="meta")
            state[f"{stem}.lora_up.weight"] = torch.empty(shape[0], 1, device="meta")
            state[f"{stem}.alpha"] = torch.tensor(1.0)
    return state


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_real_sizes_by_module_names(name: str) -> None:
    model, count = _sized(name)
    state = _whole_kohya(model)
    read = read_lora(state, model)
    assert len(read.layers) == count
    assert all(set(u) >= {"to_q", "to_k", "to_v"} for u in read.layers.values())
    assert set(read.skipped.values()) == {"outside attention"}
    assert len(read.skipped) + 3 * sum(map(len, read.layers.values())) == len(state)


def test_real_sizes_of_sdxl_by_its_first_names() -> None:
    """The names of kohya's SDXL files: blocks as published, and depth and layers in each."""
    model, count = _sized("sdxl")
    blocks = {4: 2, 5: 2, 7: 10, 8: 10}
    stems = [
        f"input_blocks_{b}_1_transformer_blocks_{i}" for b in blocks for i in range(blocks[b])
    ]
    stems += [f"middle_block_1_transformer_blocks_{i}" for i in range(10)]
    blocks = {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}
    stems += [
        f"output_blocks_{b}_1_transformer_blocks_{i}" for b in blocks for i in range(blocks[b])
    ]
    state = {}
    for stem in stems:
        small = "_blocks_4_" in stem or "_blocks_5_" in stem or "output_blocks_3_" in stem
        width = 640 if small and "put_blocks" in stem else 1280
        for attn, wide in (("attn1", width), ("attn2", 2048)):
            for layer in ("to_q", "to_k", "to_v", "to_out_0"):
                key = f"lora_unet_{stem}_{attn}_{layer}"
                given = wide if layer in ("to_k", "to_v") else width
                state[f"{key}.lora_down.weight"] = torch.zeros(1, given)
                state[f"{key}.lora_up.weight"] = torch.zeros(width, 1)
                state[f"{key}.alpha"] = torch.tensor(1.0)
    state["lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight"] = torch.zeros(1, 320, 3, 3)
    state["lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    read = read_lora(state, model)
    assert len(read.layers) == count
    assert set(read.skipped.values()) == {"outside attention", "of a text encoder"}


def test_sdxl_is_written_by_its_first_names(tmp_path: Path) -> None:
    model, inputs = _tiny_sdxl()
    attnproc.on(model).with_lora("style", rank=2)
    for module in model.modules():
        if isinstance(module, attnproc.linears.LoRALinear):
            nn.init.normal_(module.up.weight)
    out = outputs(model, inputs)
    save_lora(model, tmp_path / "xl.safetensors", layout="kohya")
    keys = safetensors.load_file(tmp_path / "xl.safetensors")
    assert any(k.startswith("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1") for k in keys)

    state, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        tmp_path, weight_name="xl.safetensors", unet_config=model.config
    )[:2]
    plain, _ = _tiny_sdxl()
    diffusers.StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, plain)
    _same(outputs(plain, inputs), out)


def _tiny_sdxl() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    torch.manual_seed(1)
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": 10,
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 8), "time_ids": torch.ones(1, 6)},
    }
    return model.eval(), inputs


def test_real_sizes_of_flux() -> None:
    model, count = _sized("flux")
    state = {}
    layers = {"attn_qkv": 9216, "attn_proj": 3072, "mlp_0": 12288, "mod_lin": 18432}
    stems = {
        f"double_blocks_{i}_{stream}_{layer}": (3072, rows)
        for i in range(19)
        for stream in ("img", "txt")
        for layer, rows in layers.items()
    }
    stems |= {f"single_blocks_{i}_linear1": (3072, 21504) for i in range(38)}
    stems |= {f"single_blocks_{i}_linear2": (15360, 3072) for i in range(38)}
    for stem, (wide, rows) in stems.items():
        state[f"lora_unet_{stem}.lora_down.weight"] = torch.zeros(1, wide)
        state[f"lora_unet_{stem}.lora_up.weight"] = torch.zeros(rows, 1)
        state[f"lora_unet_{stem}.alpha"] = torch.tensor(1.0)
    for part in ("down", "up"):
        nn.init.normal_(state[f"lora_unet_single_blocks_0_linear1.lora_{part}.weight"])
    read = read_lora(state, model)
    assert len(read.layers) == count
    assert {len(updates) for updates in read.layers.values()} == {3, 8}

    theirs, _ = diffusers.FluxPipeline.lora_state_dict(
        {f"{key}": value.clone() for key, value in state.items()}, return_alphas=True
    )
    attention = {k.split(".lora_")[0] for k in theirs if ".attn." in k}
    assert len(attention) == sum(map(len, read.layers.values()))
    for projection, weights in read.layers["single_transformer_blocks.0.attn"].items():
        stem = f"transformer.single_transformer_blocks.0.attn.{projection}.lora"
        update = theirs[f"{stem}_B.weight"] @ theirs[f"{stem}_A.weight"]
        torch.testing.assert_close(weights.factor * weights.up @ weights.down, update)


def test_flux_is_written_with_q_k_v_in_one(tmp_path: Path) -> None:
    _adapted("flux")[0].save_lora_adapter(tmp_path, "given")
    model, out, read = _ours("flux", tmp_path)
    save_lora(model, tmp_path / "kohya.safetensors", layout="kohya")
    keys = safetensors.load_file(tmp_path / "kohya.safetensors")
    assert "lora_unet_single_blocks_0_linear1.lora_up.weight" in keys
    _, again, _ = _ours("flux", tmp_path / "kohya.safetensors")
    _same(again, out)

    # One matrix `down` for the three stays one, and projections without an update get none.
    updates = read.layers["transformer_blocks.0.attn"]
    shared = updates["to_q"]
    read.layers.clear()
    read.layers["transformer_blocks.0.attn"] = {"to_q": shared, "to_v": shared}
    model, out, _ = _ours("flux", read)
    save_lora(model, tmp_path / "shared.safetensors", layout="kohya")
    keys = safetensors.load_file(tmp_path / "shared.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert torch.equal(keys[f"{stem}.lora_down.weight"], shared.down)
    _, again, _ = _ours("flux", tmp_path / "shared.safetensors")
    _same(again, out)


SPELLINGS = {
    "kohya": "lora_unet_{flat}.lora_{part}.weight",
    "diffusers": "unet.{dotted}.lora.{part}.weight",
    "adapter name": "{dotted}.lora_{letter}.default.weight",
    "linear layer": "unet.{dotted}.lora_linear_layer.{part}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_same(spelling: str) -> None:
    dotted = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    tensors = {"down": torch.randn(2, 64), "up": torch.randn(64, 2)}
    names = {"flat": dotted.replace(".", "_"), "dotted": dotted}
    state = {
        SPELLINGS[spelling].format(part=part, letter="AB"[part == "up"], **names): tensor
        for part, tensor in tensors.items()
    }
    read = read_lora(state, built("unet")[0])
    weights = read.layers[dotted.removesuffix(".to_out.0")]["to_out"]
    assert torch.equal(weights.down, tensors["down"])
    assert torch.equal(weights.up, tensors["up"])


def test_fluxs_own_names() -> None:
    stem = "diffusion_model.double_blocks.0.txt_attn.qkv"
    state = {
        f"{stem}.lora_A.weight": torch.ones(2, 32),
        f"{stem}.lora_B.weight": torch.ones(96, 2),
    }
    read = read_lora(state, built("flux")[0])
    assert set(read.layers["transformer_blocks.0.attn"]) == set(ADDED[:3])
