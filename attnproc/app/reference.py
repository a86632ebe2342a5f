"""A reference picture, noised as far as the others at each step, in the batch's first row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnproc.app.faults import Fault

__all__ = ["Noised"]


@dataclass(frozen=True)
class Noised:
    """Puts the reference into the first row after each step.

    Args:
        latents: The reference ``[1, C, H, W]``.
        noise: What is added to it, the same at all steps.
    """

    latents: Tensor
    noise: Tensor

    @classmethod
    def read(cls, path: Path, pipeline: Any) -> Noised:
        """Reads a picture, in the model's size and on white.

        Raises:
            Fault: It can't be read.
        """
        try:
            picture = Image.open(path).convert("RGBA")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise Fault(f"--reference {path}: it can't be read as a picture") from error
        side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        small = whole.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None]
        pixels = pixels.to(pipeline.device, pipeline.unet.dtype) / 127.5 - 1
        latents = pipeline.vae.encode(pixels).latents * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        return cls(latents, noise.to(latents))

    def __call__(self, pipeline: Any, step: int, _time: Any, tensors: dict[str, Any]) -> Any:
        times, latents = pipeline.scheduler.timesteps, tensors["latents"]
        first = self.latents
        if step + 1 < len(times):
            first = pipeline.scheduler.add_noise(first, self.noise, times[step + 1 : step + 2])
        return {**tensors, "latents": torch.cat((first, latents[1:]))}
