"""A VAE without weights: pixel shuffle between RGB pictures and 12-channel latents."""

# The libraries used here are typed in part only.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Generator, Tensor
from torch.nn import functional

__all__ = ["PixelShuffle"]


class PixelShuffle(ModelMixin, ConfigMixin):
    """Packs each 2 x 2 patch of RGB into the 12 channels of one latent cell, without loss.

    Args:
        block_out_channels: Its length tells pipelines the ratio of sizes, here 2.
        latent_channels: Channels of a latent cell.
        scaling_factor: Factor between latents and pixels.
    """

    anchor: Tensor

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (1, 1),
        latent_channels: int = 12,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        # Pipelines ask a model for its device and dtype, so it needs one tensor.
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """RGB in -1 to 1, [B, 3, 2H, 2W], to latents [B, 12, H, W]."""
        latents = functional.pixel_unshuffle(x, 2)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, 12, H, W] to RGB, [B, 3, 2H, 2W]; `generator` is not needed."""
        sample = functional.pixel_shuffle(z, 2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, **_: Any) -> Tensor:
        """Encodes and decodes, hence gives `sample` back."""
        return sample
