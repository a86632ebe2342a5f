"""IP-Adapters as published, read, put on and written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnproc
from attnproc.weights import load_ip_adapter, read_ip_adapter, save_ip_adapter

pytest.importorskip("diffusers")

import diffusers
import safetensors.torch as safetensors
from diffusers.models.embeddings import IPAdapterPlusImageProjection, IPAdapterTimeImageProjection
from tiny_models import built, outputs

EMBEDS = 6
State = dict[str, dict[str, Tensor]]


def _same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


def _pair(number: int, hidden: int, wide: int, *, bias: bool = False) -> dict[str, Tensor]:
    tensors = {f"{number}.to_{n}_ip.weight": torch.randn(hidden, wide) for n in "kv"}
    if bias:
        tensors |= {f"{number}.to_{n}_ip.bias": torch.randn(hidden) for n in "kv"}
    return tensors


def _linear(wide: int, tokens: int = 4) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(tokens * wide, EMBEDS),
        "proj.bias": torch.randn(tokens * wide),
        "norm.weight": torch.rand(wide) + 0.5,
        "norm.bias": torch.randn(wide),
    }


def _unet_state() -> State:
    """Stable Diffusion's layout: odd numbers, in the order of the cross attention layers."""
    torch.manual_seed(2)
    model, _ = built("unet")
    cross = [a for _, a in attnproc.interop.processors(model) if a.is_cross_attention]
    layers = {}
    for i, attn in enumerate(cross):
        layers |= _pair(2 * i + 1, attn.query_dim, 16)
    return {"image_proj": _linear(16), "ip_adapter": layers}


def _flux_state() -> State:
    torch.manual_seed(2)
    layers = _pair(0, 32, 16, bias=True)
    return {"image_proj": _linear(16), "ip_adapter": layers}


def _sd3_state() -> State:
    torch.manual_seed(2)
    model, _ = built("sd3")
    layers = {}
    for i in range(len(list(attnproc.interop.processors(model)))):
        layers |= _pair(i, 32, 32)
        layers |= {
            f"{i}.norm_ip.linear.weight": torch.randn(64, 24) / 5,
            f"{i}.norm_ip.linear.bias": torch.randn(64),
            **{f"{i}.norm_{n}.weight": torch.rand(8) + 0.5 for n in ("q", "k", "ip_k")},
        }
    projection = IPAdapterTimeImageProjection(
        embed_dim=EMBEDS, output_dim=32, hidden_dim=24, heads=1, num_queries=3
    )
    return {"image_proj": projection.state_dict(), "ip_adapter": layers}


STATES = {"unet": _unet_state, "flux": _flux_state, "sd3": _sd3_state}
each_model = pytest.mark.parametrize("name", STATES)


def _flat(state: State) -> dict[str, Tensor]:
    return {
        f"{part}.{k}": v.contiguous() for part, inner in state.items() for k, v in inner.items()
    }


def _prompted(name: str, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A call with an image's tokens."""
    if name == "unet":
        text = inputs["encoder_hidden_states"]
        # `image_embeds` is what diffusers projects, and what it asks for.
        return {**inputs, "encoder_hidden_states": (text, [tokens])}
    return {**inputs, "joint_attention_kwargs": {"ip_hidden_states": [tokens]}}


def _theirs(name: str, state: State) -> tuple[Tensor, Tensor]:
    """What diffusers' loader makes of a file, and the tokens that it gave the layers."""
    torch.manual_seed(5)
    embeds = torch.randn(2, 1, EMBEDS) if name != "sd3" else torch.randn(2, 5, EMBEDS)
    model, inputs = built(name)
    if name == "sd3":
        model._load_ip_adapter_weights(state, low_cpu_mem_usage=False)
        inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": embeds}
        return outputs(model, inputs), embeds
    model._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    if name == "unet":
        inputs["added_cond_kwargs"] = {"image_embeds": [embeds]}
    else:
        inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": [embeds]}
    return outputs(model, inputs), model.encoder_hid_proj([embeds])[0].detach()


def _ours(name: str, file: Any, given: Tensor, state: State) -> tuple[nn.Module, Tensor]:
    model, inputs = built(name)
    if name == "sd3":
        # The projection depends on the step, so it stays diffusers'; only the layers are ours.
        model.image_proj = model._convert_ip_adapter_image_proj_to_diffusers(
            state["image_proj"], low_cpu_mem_usage=False
        )
        load_ip_adapter(model, file, scale=0.5)
        inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": given}
        return model, outputs(model, inputs)
    load_ip_adapter(model, file)
    if name == "flux":
        inputs["joint_attention_kwargs"] = {"ip_hidden_states": [given]}
        return model, outputs(model, inputs)
    return model, outputs(model, _prompted(name, inputs, given))


@each_model
def test_reads_as_diffusers_does(name: str, tmp_path: Path) -> None:
    state = STATES[name]()
    theirs, given = _theirs(name, state)
    safetensors.save_file(_flat(state), tmp_path / "ip.safetensors")
    torch.save(state, tmp_path / "ip.bin")
    for file in (state, tmp_path / "ip.safetensors", tmp_path / "ip.bin"):
        model, out = _ours(name, file, given, state)
        _same(out, theirs)
    plain, inputs = built(name)
    before = outputs(plain, inputs)
    attnproc.on(model).without("ip", missing=True)
    _same(outputs(model, inputs), before)
    assert not any("_ip" in key for key in model.state_dict())


@each_model
def test_diffusers_reads_what_we_save(name: str, tmp_path: Path) -> None:
    state = STATES[name]()
    model, _ = built(name)
    read = load_ip_adapter(model, state)
    assert read.layout == name
    save_ip_adapter(model, tmp_path / "ip.safetensors", read.image_projection)
    flat = safetensors.load_file(tmp_path / "ip.safetensors")
    expected = _flat(state)
    assert flat.keys() == expected.keys()
    assert all(torch.equal(flat[key], value) for key, value in expected.items())
    nested = read.state_dict()
    assert _flat(nested).keys() == expected.keys()
    assert torch.equal(_theirs(name, nested)[0], _theirs(name, state)[0])


def test_the_second_of_two_prompts(tmp_path: Path) -> None:
    first, second = _unet_state(), _unet_state()
    second["ip_adapter"] = {k: v + 1 for k, v in second["ip_adapter"].items()}
    second["image_proj"] = _linear(16, 6)
    model, _ = built("unet")
    load_ip_adapter(model, first, 0.5)
    read = load_ip_adapter(model, second, 0.25)
    proc = next(a.processor for _, a in attnproc.interop.processors(model) if a.is_cross_attention)
    assert list(proc.num_tokens) == [4, 6]
    assert list(proc.scale) == [0.5, 0.25]
    save_ip_adapter(model, tmp_path / "b.safetensors", read.image_projection, prompt=1)
    flat = safetensors.load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(flat[key], value) for key, value in _flat(second).items())
    with pytest.raises(ValueError, match="prompt 2"):
        save_ip_adapter(model, tmp_path / "c.safetensors", {}, prompt=2)


def test_tokens_of_the_plain_projection() -> None:
    state = _unet_state()
    model, _ = built("unet")
    read = read_ip_adapter(state, model)
    embeds = torch.randn(2, EMBEDS)
    projection = model._convert_ip_adapter_image_proj_to_diffusers(
        state["image_proj"], low_cpu_mem_usage=False
    )
    torch.testing.assert_close(read.tokens(embeds), projection(embeds))


PROJECTIONS = {
    "plain": (_linear(16), 4),
    "plus": (
        IPAdapterPlusImageProjection(EMBEDS, 16, 8, 1, 4, 1, 5).state_dict(),
        5,
    ),
    "full face": (
        {"proj.0.weight": torch.zeros(6, 6), "proj.3.weight": torch.zeros(16)},
        257,
    ),
    "face": (
        {"proj.0.weight": torch.zeros(12, 6), "proj.2.weight": torch.zeros(64, 12)}
        | {"norm.weight": torch.zeros(16)},
        4,
    ),
    "face plus": ({"perceiver_resampler.proj_in.weight": torch.zeros(2, 2)}, 4),
}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_kinds_of_image_projections(kind: str) -> None:
    projection, tokens = PROJECTIONS[kind]
    state = {**_unet_state(), "image_proj": projection}
    read = read_ip_adapter(state, built("unet")[0])
    assert read.num_tokens == tokens
    if kind != "plain":
        with pytest.raises(ValueError, match="diffusers' load_ip_adapter"):
            read.tokens(torch.zeros(1, EMBEDS))


def test_low_rank_updates_of_faces_come_along() -> None:
    state = _unet_state()
    model, inputs = built("unet")
    for number, (_, attn) in enumerate(attnproc.interop.processors(model)):
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            wide = attn.to_k.in_features if projection in ("to_k", "to_v") else attn.query_dim
            stem = f"{number}.{projection}_lora"
            state["ip_adapter"][f"{stem}.down.weight"] = torch.randn(2, wide)
            state["ip_adapter"][f"{stem}.up.weight"] = torch.randn(attn.query_dim, 2)
    theirs, _ = built("unet")
    faces = theirs._load_ip_adapter_loras([state])[0]
    theirs.load_lora_adapter(faces, prefix="unet")

    read = load_ip_adapter(model, state, scale=0.0)

    assert read.lora is not None
    assert "faceid" in attnproc.on(model).describe()
    tokens = torch.randn(2, 4, 16)
    _same(outputs(model, _prompted("unet", inputs, tokens)), outputs(theirs, inputs))


def test_files_of_xlabs() -> None:
    state = _flux_state()
    names = {
        "to_k_ip": "ip_adapter_double_stream_k_proj",
        "to_v_ip": "ip_adapter_double_stream_v_proj",
    }
    xlabs = {f"ip_adapter_proj_model.{k}": v for k, v in state["image_proj"].items()}
    for key, tensor in state["ip_adapter"].items():
        number, name, kind = key.split(".")
        xlabs[f"double_blocks.{number}.processor.{names[name]}.{kind}"] = tensor
    model, _ = built("flux")
    ours, theirs = read_ip_adapter(xlabs, model), read_ip_adapter(state, model)
    assert ours.num_tokens == theirs.num_tokens
    for path, tensors in theirs.layers.items():
        assert all(torch.equal(ours.layers[path][key], t) for key, t in tensors.items())


def test_one_error_lists_all() -> None:
    state = _unet_state()
    layers = state["ip_adapter"]
    del layers["1.to_k_ip.weight"]
    layers["3.to_v_ip.weight"] = layers["3.to_v_ip.weight"][:, :3]
    layers["99.to_v_ip.weight"] = torch.zeros(1)
    state["image_proj"] = {"what.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="IP-Adapter does not fit") as error:
        read_ip_adapter({**state, "other": torch.zeros(1)}, built("unet")[0])
    for part in (
        "other: is unknown",
        "ip_adapter.1.to_k_ip.weight: is missing",
        "ip_adapter.99.to_v_ip.weight: is unknown",
        "to_v_ip.weight: shape",
        "image_proj: is of no known kind",
    ):
        assert part in str(error.value)


def _meta(kind: str, **changes: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, kind)(**changes)


def test_real_sizes_of_unets() -> None:
    """The numbers and widths of the published files: 16 layers of SD 1.5, 70 of SDXL."""
    from test_weights_lora import SIZES

    published = {
        "sd15": [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
        "sdxl": [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
    }
    for name, widths in published.items():
        kind, changes, count = SIZES[name]
        assert len(widths) == count // 2
        wide = changes["cross_attention_dim"]
        layers = {}
        for i, hidden in enumerate(widths):
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{2 * i + 1}.{part}.weight"] = torch.empty(hidden, wide, device="meta")
        projection = {"latents": torch.empty(1, 16, 8, device="meta")}
        state = {"image_proj": projection, "ip_adapter": layers}
        read = read_ip_adapter(state, _meta(kind, **changes))
        assert len(read.layers) == len(widths)
        assert read.num_tokens == 16
        assert all(path.endswith("attn2") for path in read.layers)


def test_real_sizes_of_flux_and_sd3() -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    flux = {}
    for i in range(19):
        for part in ("to_k_ip", "to_v_ip"):
            flux |= {f"{i}.{part}.weight": empty(3072, 4096), f"{i}.{part}.bias": empty(3072)}
    projection = {"proj.weight": empty(4 * 4096, 768), "norm.weight": empty(4096)}
    model = _meta("FluxTransformer2DModel")
    read = read_ip_adapter({"image_proj": projection, "ip_adapter": flux}, model)
    assert len(read.layers) == 19
    assert read.num_tokens == 4

    sd3 = {}
    for i in range(38):
        sd3 |= {f"{i}.to_{n}_ip.weight": empty(2432, 2432) for n in "kv"}
        sd3 |= {f"{i}.norm_{n}.weight": empty(64) for n in ("q", "k", "ip_k")}
        sd3[f"{i}.norm_ip.linear.weight"] = empty(2 * 2432, 1280)
        sd3[f"{i}.norm_ip.linear.bias"] = empty(2 * 2432)
    model = _meta(
        "SD3Transformer2DModel",
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        qk_norm="rms_norm",
    )
    state = {"image_proj": {"latents": empty(1, 64, 8)}, "ip_adapter": sd3}
    read = read_ip_adapter(state, model)
    assert len(read.layers) == 38
    assert read.layout == "sd3"
