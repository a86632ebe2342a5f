"""The demo model's image prompt: its encoder, which makes the picture small, and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnproc.weights import load_ip_adapter

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from attnproc.weights import IPAdapterFile

__all__ = ["FILE", "WIDTH", "embeddings", "put_on"]

FILE = Path(__file__).parent / "demo" / "adapters" / "image.safetensors"
SIDE = 8
WIDTH = 3 * SIDE * SIDE


def embeddings(pictures: Tensor) -> Tensor:
    """Patches' means as embeddings ``[N, 192]`` of pictures ``[N, height, width, 3]``, bytes."""
    small = F.adaptive_avg_pool2d(pictures.float().permute(0, 3, 1, 2), SIDE)
    return (small / 127.5 - 1).flatten(1)


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
