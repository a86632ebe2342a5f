"""Tiny diffusers models with random weights, and a call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

__all__ = ["MODELS", "built", "outputs"]


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode and the keywords of a call, the same each time."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval(), inputs


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the model gives, as one tensor."""
    with torch.no_grad():
        out = model(**inputs, return_dict=False)
    return out[0] if isinstance(out, tuple) else out


def _unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    sizes = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**{**sizes, **changes})


def unet() -> tuple[nn.Module, dict[str, Any]]:
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 10,
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.arange(7)[None] < torch.tensor([[5], [7]]),
    }
    return _unet(), inputs


def unet_kandinsky() -> tuple[nn.Module, dict[str, Any]]:
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "encoder_hid_dim": 16,
        "encoder_hid_dim_type": "text_proj",
        "resnet_time_scale_shift": "scale_shift",
    }
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 10,
        "encoder_hidden_states": torch.randn(2, 7, 16),
    }
    return _unet(**blocks), inputs


def unet_motion() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.UNetMotionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
    )
    inputs = {
        "sample": torch.randn(1, 4, 3, 8, 8),
        "timestep": 10,
        "encoder_hidden_states": torch.randn(3, 7, 16),
    }
    return model, inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([10, 20]),
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.5, 0.2]),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(7, 3),
    }
    return model, inputs


def auraflow() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([0.5, 0.2]),
    }
    return model, inputs


def cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )
    inputs = {
        "hidden_states": torch.randn(1, 2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([10]),
        "image_rotary_emb": (torch.randn(8, 8), torch.randn(8, 8)),
    }
    return model, inputs


def hunyuan() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=4,
        text_len_t5=3,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10.0, 10.0]),
        "encoder_hidden_states": torch.randn(2, 4, 16),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": torch.randn(2, 3, 16),
        "text_embedding_mask_t5": torch.ones(2, 3),
        "image_meta_size": torch.randn(2, 6),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8)),
    }
    return model, inputs


def lumina() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=16,
    )
    angles = torch.randn(8, 8, 4)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([0.5, 0.2]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_mask": torch.arange(7)[None] < torch.tensor([[5], [7]]),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {"base_sequence_length": 9},
    }
    return model, inputs


def mochi() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=7,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "timestep": torch.tensor([10, 20]),
        "encoder_attention_mask": torch.arange(7)[None] < torch.tensor([[5], [7]]),
    }
    return model, inputs


def allegro() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=4,
        sample_width=4,
        sample_frames=2,
        caption_channels=16,
    )
    tables = tuple((torch.randn(4, 4), torch.randn(4, 4)) for _ in range(3))
    positions = tuple(torch.randint(0, 4, (1, 8)) for _ in range(3))
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "encoder_hidden_states": torch.randn(2, 1, 7, 16),
        "timestep": torch.tensor([10, 20]),
        "attention_mask": torch.ones(2, 2, 4, 4),
        "encoder_attention_mask": torch.ones(2, 1, 7),
        "image_rotary_emb": (tables, positions),
    }
    return model, inputs


def sana() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "timestep": torch.tensor([10, 20]),
        "encoder_attention_mask": torch.arange(7)[None] < torch.tensor([[5], [7]]),
    }
    return model, inputs


def stable_audio() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=16,
        cross_attention_input_dim=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8),
        "timestep": torch.tensor([10, 20]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "global_hidden_states": torch.randn(2, 1, 16),
        "rotary_embedding": (torch.randn(9, 4), torch.randn(9, 4)),
    }
    return model, inputs


def dc_ae() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )
    return model, {"sample": torch.randn(2, 3, 16, 16)}


def mochi_vae() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    return model, {"sample": torch.randn(1, 3, 7, 16, 16)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    build.__name__: build
    for build in (
        unet,
        unet_kandinsky,
        unet_motion,
        sd3,
        flux,
        auraflow,
        cogvideox,
        hunyuan,
        lumina,
        mochi,
        allegro,
        sana,
        stable_audio,
        dc_ae,
        mochi_vae,
    )
}
