"""The demo model's image prompt: its encoder, which takes the picture's palette, and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnproc.weights import load_ip_adapter

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from attnproc.weights import IPAdapterFile

__all__ = ["FILE", "WIDTH", "embeddings", "put_on"]

FILE = Path(__file__).parent / "demo" / "adapters" / "image.safetensors"
LEVELS, BANDS = 4, 3
GAIN = 4.0
WIDTH = BANDS * LEVELS**3


def embeddings(pictures: Tensor) -> Tensor:
    """Palettes ``[N, 192]`` of pictures ``[N, height, width, 3]``, bytes.

    In each third from top to bottom: the root of the share of each of 4 x 4 x 4 colours, where a
    pixel counts for those around its own.
    """
    steps = torch.arange(LEVELS, device=pictures.device)
    near = (pictures.float()[..., None] / 255 * (LEVELS - 1) - steps).abs()
    red, green, blue = (1 - near).clamp(min=0).unbind(3)  # [N, height, width, 4]
    bands = [
        torch.einsum("nhwr,nhwg,nhwb->nrgb", *band) / band[0].shape[1:3].numel()
        for band in zip(*(part.tensor_split(BANDS, 1) for part in (red, green, blue)), strict=True)
    ]
    return GAIN * torch.stack(bands, 1).flatten(1).sqrt()


def put_on(unet: UNet2DConditionModel, scale: float, file: Path = FILE) -> None:
    """Puts an image prompt on the demo model; its pipeline then takes image embeddings.

    Args:
        unet: The model.
        scale: The prompt's weight.
        file: The prompt's weights; those that ship if not given.
    """
    model: Any = unet
    read = load_ip_adapter(model, file, scale)
    tensors = {k: v.to(model.device, model.dtype) for k, v in read.image_projection.items()}
    model.encoder_hid_proj = _Tokens(replace(read, image_projection=tensors))
    model.config.encoder_hid_dim_type = "ip_image_proj"


class _Tokens(nn.Module):
    """Tokens ``[B, images, tokens, C]`` of embeddings ``[B, images, E]``, for each prompt."""

    def __init__(self, file: IPAdapterFile) -> None:
        super().__init__()
        self.file = file

    def forward(self, embeds: list[Tensor]) -> list[Tensor]:
        return [self.file.tokens(each) for each in embeds]
