"""Our processors in a diffusers pipeline: the same picture, and back again.

Run `python examples/drop_in.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnproc
from attnproc.app.demo import model

STEPS = 4


def main() -> None:
    """Compare pictures by diffusers' processors, by ours, and by diffusers' again."""
    pipeline = model.load()
    theirs = painted(pipeline)

    print(attnproc.swap(pipeline.unet))
    ours = painted(pipeline)
    print(f"largest difference of a pixel, of 1: {(ours - theirs).abs().max():.1e}")

    print(f"put back: {attnproc.restore(pipeline.unet)}")
    same = torch.equal(painted(pipeline), theirs)
    print("the picture is the first one to the bit" if same else "the picture differs")


def painted(pipeline: Any) -> Tensor:
    """A picture ``[1, 64, 64, 3]`` of 0 to 1, always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    result = pipeline("red heart", num_inference_steps=STEPS, generator=noise, output_type="pt")
    return result.images


if __name__ == "__main__":
    main()
