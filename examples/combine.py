"""Parts on one model: LoRA, an image prompt, slicing, perturbation; scales by step; off again.

The weights are random, so this shows how parts go together and not what they are good for: that is
what `train_lora.py`, `train_ip_adapter.py` and `attnproc generate` show.

Run `python examples/combine.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnproc
from attnproc.app.demo import model


def main() -> None:
    """Put parts on the demo model, run it, take them off."""
    torch.manual_seed(0)
    unet: Any = model.load().unet
    before = denoised(unet)

    every = attnproc.on(unet)
    snapshot = every.snapshot()
    every.with_lora("style", rank=4, weight=0.8).with_slicing(2)
    attnproc.on(unet, kind="cross").with_ip_adapter(192, 4)
    attnproc.on(unet, "mid_block.*", kind="self").with_pag(3)
    # The image prompt only steers the first half of the steps.
    every.clock.set(0.0)
    attnproc.on(unet, kind="cross").scale("ip", every.schedule(0.6, end=0.5))
    print(attnproc.on(unet, "mid_block.*").describe())

    prompt = torch.randn(3, 1, 4, 192)
    early = denoised(unet, prompt)
    every.clock.set(0.75)
    late = denoised(unet, prompt)
    print(f"the image prompt changes the prediction by {(early - late).abs().max():.2f}")

    snapshot.restore()
    same = torch.equal(denoised(unet), before)
    print("restored to the bit" if same else "not restored")


@torch.no_grad()
def denoised(unet: Any, prompt: Tensor | None = None) -> Tensor:
    """The model's prediction ``[3, 12, 32, 32]`` for fixed noise and text."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 12, 32, 32, generator=generator).expand(3, -1, -1, -1)
    text = torch.randn(3, 24, 192, generator=generator)
    context = text if prompt is None else (text, [prompt])
    return unet(noise, 500, context, return_dict=False)[0]


if __name__ == "__main__":
    main()
