"""Attention calls at the sizes that published models make them, one a row.

A row names a processor class, the module it runs on, and the call's inputs. For small machines
`shrink` divides the tokens, of the image and of a long text, and `narrow` the heads and with them
the width; the channels of a head stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["ROWS", "Row", "Setting", "Sizes", "make", "pairs"]

Random = Callable[..., Tensor]
# A text as long as this shrinks with the image; a shorter one is what cross attention sees.
_LONG_TEXT = 200


# Arguments of modules and processors that shrink with the number of heads.
_WIDTHS = (
    "query_dim",
    "heads",
    "kv_heads",
    "cross_attention_dim",
    "added_kv_proj_dim",
    "out_context_dim",
    "in_channels",
    "out_channels",
    "hidden_size",
    "ip_hidden_states_dim",
)


class Sizes(NamedTuple):
    """How many tokens there are of the image and of the text, and what divides the widths."""

    image: int
    text: int
    narrow: int


@dataclass(frozen=True)
class Row:
    """One attention call.

    Args:
        name: What the row is called.
        cls: The processor's class.
        x: Shape of the image or only stream; ``[B, S, C]`` or a grid.
        text: Shape of the context.
        module: Arguments of the attention module, or of `kind`.
        kind: "attention", "flux", "mochi" or "multiscale".
        init: Arguments of the processor.
        more: Makes further inputs, given the sizes and a tensor factory.
        fuse: Whether projections are fused.
        small: What divides the tokens on a CPU, so that a call takes 5 to 200 ms there.
        narrow: What divides the heads there.
    """

    name: str
    cls: str
    x: tuple[int, ...]
    text: tuple[int, ...] | None = None
    module: dict[str, Any] = field(default_factory=dict)
    kind: str = "attention"
    init: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Sizes, Random], dict[str, Any]] | None = None
    fuse: bool = False
    small: int = 16
    narrow: int = 1


@dataclass
class Setting:
    """A row made ready on a device."""

    row: Row
    attn: nn.Module
    inputs: dict[str, Any]


def make(row: Row, device: str, dtype: torch.dtype, shrink: int = 1) -> Setting:
    """Builds the row's module with random weights, and its inputs.

    Args:
        row: The row.
        device: "cpu" or "cuda".
        dtype: Of weights and inputs; rotary tables are float32.
        shrink: Divides the tokens; 0 is as the row says for a CPU, heads and all.

    Returns:
        The setting, whose row has the sizes that were made.
    """
    narrow = 1 if shrink else row.narrow
    row = _scaled(row, shrink or row.small, narrow)
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        # Made on the CPU: a graph that can't be captured leaves the GPU's generator unusable.
        return torch.randn(shape).to(device, dtype)

    x, text = row.x, row.text
    inputs: dict[str, Any] = {"hidden_states": random(*x)}
    if text is not None:
        inputs["encoder_hidden_states"] = random(*text)
    tokens = x[1] if len(x) == 3 else x[2] * x[3]
    if row.more is not None:
        inputs |= row.more(Sizes(tokens, text[1] if text else 0, narrow), random)
    attn = _module(row).to(device, dtype).eval()
    if row.fuse:
        attn.fuse_projections()
    return Setting(row, attn, inputs)


def _scaled(row: Row, shrink: int, narrow: int) -> Row:
    """The row with fewer tokens and heads."""
    if shrink == narrow == 1:
        return row
    text = row.text
    if text is not None:
        long = text[1] >= _LONG_TEXT
        tokens = max(text[1] // shrink, min(text[1], 8)) if long else text[1]
        text = (text[0], tokens, text[2] // narrow)
    return replace(
        row,
        x=_shrunk(row.x, shrink, narrow),
        text=text,
        module=_narrowed(row.module, narrow),
        init=_narrowed(row.init, narrow),
    )


def _narrowed(arguments: dict[str, Any], narrow: int) -> dict[str, Any]:
    return {k: v // narrow if k in _WIDTHS else v for k, v in arguments.items()}


def _shrunk(shape: tuple[int, ...], shrink: int, narrow: int) -> tuple[int, ...]:
    if len(shape) == 4:
        side = max(int(shape[2] / shrink**0.5), 1)
        return (shape[0], shape[1] // narrow, side, side)
    batch, tokens, width = shape
    if batch > tokens:
        # Attention over time: the places are many, not the tokens.
        return (max(batch // shrink, 1), tokens, width // narrow)
    return (batch, max(tokens // shrink, 1), width // narrow)


def _module(row: Row) -> nn.Module:
    from diffusers.models import attention_processor as home
    from diffusers.models.transformers.transformer_flux import FluxAttention

    if row.kind == "flux":
        return FluxAttention(**row.module)
    if row.kind == "mochi":
        return home.MochiAttention(processor=home.MochiAttnProcessor2_0(), **row.module)
    if row.kind == "multiscale":
        return home.SanaMultiscaleLinearAttention(**row.module)
    return home.Attention(**row.module)


def pairs(width: int, name: str = "image_rotary_emb", joint: bool = False) -> Any:
    """Makes a rotary table of cosines and sines, over the image or over text and image."""

    def more(sizes: Sizes, random: Random) -> dict[str, Any]:
        angles = random(sizes.image + (sizes.text if joint else 0), width).float()
        return {name: (angles.cos(), angles.sin())}

    return more


def _prompts(sizes: Sizes, random: Random) -> dict[str, Any]:
    width = 2048 // sizes.narrow
    states = [random(2, 1, 16, width), random(2, 1, 4, width)]
    return {"encoder_hidden_states": (random(2, 77, width), states)}


def _sd3_prompt(sizes: Sizes, random: Random) -> dict[str, Any]:
    return {"ip_hidden_states": random(2, 64, 2432 // sizes.narrow), "temb": random(2, 1280)}


def _flux_prompt(sizes: Sizes, random: Random) -> dict[str, Any]:
    rope = pairs(128, joint=True)(sizes, random)
    return {**rope, "ip_hidden_states": [random(1, 4, 4096 // sizes.narrow)]}


def _mochi(sizes: Sizes, random: Random) -> dict[str, Any]:
    angles = random(sizes.image, 24 // sizes.narrow, 64).float()
    lengths = torch.tensor([0.25, 0.78125], device=angles.device) * sizes.text
    mask = torch.arange(sizes.text, device=angles.device) < lengths[:, None]
    return {"attention_mask": mask, "image_rotary_emb": (angles.cos(), angles.sin())}


def _lumina(sizes: Sizes, random: Random) -> dict[str, Any]:
    angles = random(1, sizes.image, 36).float()
    table = torch.polar(torch.ones_like(angles), angles)
    x = random(2, sizes.image, 2304 // sizes.narrow)
    mask = torch.ones(2, sizes.image, dtype=torch.bool, device=angles.device)
    both = {"hidden_states": x, "encoder_hidden_states": x, "attention_mask": mask}
    return {**both, "query_rotary_emb": table, "key_rotary_emb": table}


def _allegro(sizes: Sizes, random: Random) -> dict[str, Any]:
    angles = [random(64, 32).float() for _ in range(3)]
    where = [torch.randint(0, 64, (1, sizes.image), device=a.device) for a in angles]
    return {"image_rotary_emb": ([(a.cos(), a.sin()) for a in angles], where)}


def _heads(width: int, heads: int, dim: int, **more: Any) -> dict[str, Any]:
    return {"query_dim": width, "heads": heads, "dim_head": dim, **more}


_SD15 = _heads(320, 8, 40)
_SDXL = _heads(640, 10, 64)
_CROSS = _heads(640, 10, 64, cross_attention_dim=2048)
_ADDED = {"context_pre_only": False, "bias": True}
_SD3 = _heads(1536, 24, 64, added_kv_proj_dim=1536, **_ADDED)
_SD35 = _heads(2432, 38, 64, added_kv_proj_dim=2432, qk_norm="rms_norm", eps=1e-6, **_ADDED)
_FLUX = _heads(3072, 24, 128, bias=True, eps=1e-6)
_DOUBLE = {**_FLUX, "added_kv_proj_dim": 3072, "context_pre_only": False}
_HUNYUAN = _heads(1408, 16, 88, qk_norm="layer_norm", bias=True, eps=1e-6)
_SANA = _heads(2240, 70, 32)
_AUDIO = _heads(1536, 24, 64, out_bias=False)
_AURA = {"qk_norm": "fp32_layer_norm", "added_proj_bias": False, "out_bias": False, "bias": False}
_LUMINA = {"qk_norm": "layer_norm_across_heads", "kv_heads": 8, "out_bias": False, "bias": False}
_LONG = (2, 4096, 640)

ROWS = [
    Row("sd15-self-4096", "AttnProcessor2_0", (2, 4096, 320), module=_SD15, small=4),
    Row("sdxl-self-4096", "AttnProcessor2_0", _LONG, module=_SDXL, small=8),
    Row("sdxl-cross-4096x77", "AttnProcessor2_0", _LONG, (2, 77, 2048), _CROSS, small=8),
    Row("sdxl-fused-self-4096", "FusedAttnProcessor2_0", _LONG, module=_SDXL, fuse=True, small=8),
    Row(
        "sdxl-ip-cross-4096",
        "IPAdapterAttnProcessor2_0",
        _LONG,
        module=_CROSS,
        init={
            "hidden_size": 640,
            "cross_attention_dim": 2048,
            "num_tokens": (16, 4),
            "scale": [0.6, 0.4],
        },
        more=_prompts,
        small=8,
    ),
    Row(
        "sdxl-custom-diffusion",
        "CustomDiffusionAttnProcessor2_0",
        _LONG,
        (2, 77, 2048),
        _CROSS,
        init={"hidden_size": 640, "cross_attention_dim": 2048},
        small=8,
    ),
    Row("sd15-eager-4096", "AttnProcessor", (2, 4096, 320), module=_SD15, small=1),
    Row(
        "sd15-sliced-4096",
        "SlicedAttnProcessor",
        (2, 4096, 320),
        None,
        _SD15,
        init={"slice_size": 4},
        small=1,
    ),
    Row(
        "kandinsky-addedkv-1024",
        "AttnAddedKVProcessor2_0",
        (2, 768, 32, 32),
        (2, 77, 768),
        _heads(
            768,
            12,
            64,
            added_kv_proj_dim=768,
            norm_num_groups=32,
            bias=True,
            residual_connection=True,
            cross_attention_dim=768,
        ),
        small=4,
    ),
    Row(
        "sd15-cross-frame-8x4096",
        "CrossFrameAttnProcessor",
        (16, 1024, 320),
        module=_SD15,
        small=4,
    ),
    Row(
        "sdxl-pagcfg-self-4096",
        "PAGCFGIdentitySelfAttnProcessor2_0",
        (3, 4096, 640),
        module=_SDXL,
        small=8,
    ),
    Row(
        "sd3-joint-4096+333",
        "JointAttnProcessor2_0",
        (2, 4096, 1536),
        (2, 333, 1536),
        _SD3,
        small=8,
        narrow=4,
    ),
    Row(
        "sd35-joint-4096+333",
        "JointAttnProcessor2_0",
        (2, 4096, 2432),
        (2, 333, 2432),
        _SD35,
        narrow=2,
    ),
    Row(
        "sd3-fused-joint-4096",
        "FusedJointAttnProcessor2_0",
        (2, 4096, 1536),
        (2, 333, 1536),
        _SD3,
        fuse=True,
        small=8,
        narrow=4,
    ),
    Row(
        "sd3-pagcfg-joint-4096",
        "PAGCFGJointAttnProcessor2_0",
        (3, 4096, 1536),
        (3, 333, 1536),
        _SD3,
        small=8,
        narrow=4,
    ),
    Row(
        "sd3-pag-joint-4096",
        "PAGJointAttnProcessor2_0",
        (2, 4096, 1536),
        (2, 333, 1536),
        _SD3,
        small=8,
        narrow=4,
    ),
    Row(
        "sd35-ip-joint-4096",
        "SD3IPAdapterJointAttnProcessor2_0",
        (2, 4096, 2432),
        (2, 333, 2432),
        _SD35,
        init={"hidden_size": 2432, "ip_hidden_states_dim": 2432, "head_dim": 64},
        more=_sd3_prompt,
        narrow=2,
    ),
    Row(
        "flux-double-4096+512",
        "FluxAttnProcessor2_0",
        (1, 4096, 3072),
        (1, 512, 3072),
        _DOUBLE,
        "flux",
        more=pairs(128, joint=True),
        small=8,
        narrow=4,
    ),
    Row(
        "flux-fused-double-4096",
        "FusedFluxAttnProcessor2_0",
        (1, 4096, 3072),
        (1, 512, 3072),
        _DOUBLE,
        "flux",
        more=pairs(128, joint=True),
        fuse=True,
        small=8,
        narrow=4,
    ),
    Row(
        "flux-single-4608",
        "FluxSingleAttnProcessor2_0",
        (1, 4608, 3072),
        None,
        {**_FLUX, "pre_only": True},
        "flux",
        more=pairs(128),
        small=8,
        narrow=4,
    ),
    Row(
        "flux-ip-double-4096",
        "FluxIPAdapterJointAttnProcessor2_0",
        (1, 4096, 3072),
        (1, 512, 3072),
        _DOUBLE,
        "flux",
        {"hidden_size": 3072, "cross_attention_dim": 4096},
        _flux_prompt,
        small=8,
        narrow=4,
    ),
    Row(
        "auraflow-4096+256",
        "AuraFlowAttnProcessor2_0",
        (1, 4096, 3072),
        (1, 256, 3072),
        _heads(3072, 12, 256, added_kv_proj_dim=3072, context_pre_only=False, **_AURA),
        small=8,
        narrow=4,
    ),
    Row(
        "cogvideox5b-17550+226",
        "CogVideoXAttnProcessor2_0",
        (1, 17550, 3072),
        (1, 226, 3072),
        _heads(3072, 48, 64, qk_norm="layer_norm", bias=True, eps=1e-6),
        more=pairs(64),
        narrow=8,
    ),
    Row(
        "hunyuandit-self-4096",
        "HunyuanAttnProcessor2_0",
        (2, 4096, 1408),
        None,
        _HUNYUAN,
        more=pairs(88),
        small=8,
        narrow=4,
    ),
    Row(
        "hunyuandit-pagcfg-4096",
        "PAGCFGHunyuanAttnProcessor2_0",
        (3, 4096, 1408),
        None,
        _HUNYUAN,
        more=pairs(88),
        small=8,
        narrow=4,
    ),
    Row(
        "mochi-16384+256-masked",
        "MochiAttnProcessor2_0",
        (2, 16384, 3072),
        (2, 256, 1536),
        _heads(3072, 24, 128, added_kv_proj_dim=1536, added_proj_bias=False, out_context_dim=1536),
        "mochi",
        more=_mochi,
        narrow=4,
    ),
    Row(
        "mochi-vae-temporal",
        "MochiVaeAttnProcessor2_0",
        (3000, 28, 768),
        None,
        _heads(768, 8, 96, qk_norm="l2", is_causal=True),
        narrow=2,
    ),
    Row(
        "sana-linear-1024",
        "SanaLinearAttnProcessor2_0",
        (2, 1024, 2240),
        module=_SANA,
        small=4,
        narrow=5,
    ),
    Row(
        "sana-linear-16384",
        "SanaLinearAttnProcessor2_0",
        (2, 16384, 2240),
        module=_SANA,
        small=8,
        narrow=5,
    ),
    Row(
        "sana-linear-pagcfg-4096",
        "PAGCFGSanaLinearAttnProcessor2_0",
        (3, 4096, 2240),
        module=_SANA,
        small=4,
        narrow=5,
    ),
    Row(
        "dcae-multiscale-64x64",
        "SanaMultiscaleAttnProcessor2_0",
        (2, 512, 64, 64),
        None,
        {
            "in_channels": 512,
            "out_channels": 512,
            "attention_head_dim": 32,
            "kernel_sizes": (5,),
            "norm_type": "rms_norm",
            "residual_connection": True,
        },
        "multiscale",
        small=4,
    ),
    Row(
        "stable-audio-self-1024",
        "StableAudioAttnProcessor2_0",
        (2, 1025, 1536),
        None,
        _AUDIO,
        more=pairs(32, name="rotary_emb"),
        small=4,
        narrow=2,
    ),
    Row(
        "stable-audio-cross",
        "StableAudioAttnProcessor2_0",
        (2, 1024, 1536),
        (2, 130, 768),
        {**_AUDIO, "cross_attention_dim": 768, "kv_heads": 12},
        more=pairs(32, name="rotary_emb"),
        small=4,
        narrow=2,
    ),
    Row(
        "lumina-self-4096-gqa",
        "LuminaAttnProcessor2_0",
        (2, 4096, 2304),
        (2, 4096, 2304),
        _heads(2304, 32, 72, eps=1e-5, **_LUMINA),
        more=_lumina,
        small=8,
        narrow=4,
    ),
    Row(
        "allegro-28800",
        "AllegroAttnProcessor2_0",
        (1, 28800, 2304),
        None,
        _heads(2304, 24, 96, bias=True),
        more=_allegro,
        narrow=4,
    ),
]
