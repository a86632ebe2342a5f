"""What the three training examples share: the demo model, its loss, one loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from attnproc.app.demo import model

__all__ = ["Denoiser", "Settings", "command", "fit", "frozen", "latents", "summary", "trained"]

Out = Annotated[Path, typer.Option(help="The safetensors file to write.")]
Sheet = Annotated[Path | None, typer.Option(help="Also draw before and after, into this PNG.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures a step.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast).")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Compute activations twice to save memory.")
]
Compiled = Annotated[bool, typer.Option("--compile", help="Compile the model.")]

Draw = Callable[[int], tuple[Tensor, ...]]
"""Draws a batch: latents, text states and, with an image prompt, image embeddings."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Training steps.
        batch: Pictures a step.
        rate: Highest learning rate; it falls to 0 as a cosine.
        seed: Seed of all that is drawn at random.
        bf16: Whether to compute in bfloat16 where that is safe.
        checkpointing: Whether activations are computed again for the gradients.
        compiled: Whether the model is compiled.
        lowest: Noise steps below this one are left out.
    """

    steps: int
    batch: int
    rate: float
    seed: int = 0
    bf16: bool = False
    checkpointing: bool = False
    compiled: bool = False
    lowest: int = 0


def command(
    teach: Callable[[Path, Path | None, Settings], None],
    *,
    file: str,
    length: int,
    pictures: int = 8,
    highest: float = 2e-3,
    lowest: int = 0,
) -> Callable[..., None]:
    """A command line for an example.

    Args:
        teach: What it does with the file to write, the sheet to draw, and the settings.
        file: The file's name if none is given.
        length: How many steps, if none are given.
        pictures: How many pictures a step.
        highest: The learning rate.
        lowest: Noise steps below this one are left out.
    """

    def main(
        out: Out = Path(file),
        sheet: Sheet = None,
        steps: Steps = length,
        batch: Batch = pictures,
        rate: Rate = highest,
        seed: Seed = 0,
        bf16: Bf16 = False,
        checkpointing: Checkpointing = False,
        compiled: Compiled = False,
    ) -> None:
        given = Settings(steps, batch, rate, seed, bf16, checkpointing, compiled, lowest)
        teach(out, sheet, given)

    main.__doc__ = teach.__doc__
    return main


class Denoiser(nn.Module):
    """A U-Net, and what makes tokens of image embeddings if there is an image prompt."""

    def __init__(self, unet: nn.Module, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.unet, self.projection = unet, projection

    def forward(
        self, noisy: Tensor, step: Tensor, text: Tensor, embeds: Tensor | None = None
    ) -> Tensor:
        """Predicts v.

        Args:
            noisy: Latents ``[B, 12, 32, 32]``.
            step: Noise steps ``[B]``.
            text: Text states ``[B, 24, 192]``.
            embeds: Image embeddings ``[B, E]``.
        """
        context = text if embeds is None else (text, [self.projection(embeds)])
        return self.unet(noisy, step, context, return_dict=False)[0]


def frozen(seed: int) -> Any:
    """The demo model as a pipeline whose weights do not train."""
    torch.manual_seed(seed)
    pipeline = model.load()
    for part in (pipeline.unet, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


def trained(unet: nn.Module, ending: str) -> None:
    """Lets those weights of a frozen model train that have `ending` in their name."""
    for name, weight in unet.named_parameters():
        weight.requires_grad_(ending in name)


@torch.no_grad()
def texts(pipeline: Any, captions: Sequence[str]) -> Tensor:
    """Text states ``[N, 24, 192]`` of captions."""
    return pipeline.encode_prompt(list(captions), pipeline.device, 1, False)[0]


def latents(pictures: Tensor) -> Tensor:
    """Latents ``[N, 12, 32, 32]`` of pictures ``[N, 64, 64, 3]``, bytes."""
    pixels = pictures.permute(0, 3, 1, 2) / 127.5 - 1
    return nn.functional.pixel_unshuffle(pixels, 2)


def fit(denoiser: Denoiser, scheduler: Any, draw: Draw, settings: Settings) -> list[float]:
    """Trains what is not frozen.

    Args:
        denoiser: The model.
        scheduler: The pipeline's, for its noise levels.
        draw: Gives a batch of so many pictures.
        settings: How to train.

    Returns:
        The loss of each step.
    """
    accelerator = Accelerator(mixed_precision="bf16" if settings.bf16 else "no")
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, settings.rate, weight_decay=0.0)
    if settings.checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    if settings.compiled:
        denoiser.unet.compile()
    model, optimiser = accelerator.prepare(denoiser, optimiser)

    losses: list[float] = []
    for step in _shown(range(settings.steps), losses):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * _share(step, settings.steps)
        batch = [part.to(accelerator.device) for part in draw(settings.batch)]
        loss = velocity_loss(model, scheduler, *batch, lowest=settings.lowest)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    denoiser.unet.disable_gradient_checkpointing()
    return losses


def summary(out: Path, losses: Sequence[float]) -> str:
    """One line: what was written, and the mean loss in the beginning and in the end."""
    first, last = (sum(part) / len(part) for part in (losses[:20], losses[-20:]))
    return f"{out}: {len(losses)} steps, loss {first:.4f} at first, {last:.4f} at the end"


def velocity_loss(
    denoiser: nn.Module, scheduler: Any, clean: Tensor, *condition: Tensor, lowest: int = 0
) -> Tensor:
    """Mean squared error of v at evenly spread random noise steps from `lowest` on."""
    size, steps = len(clean), scheduler.config.num_train_timesteps
    where = (torch.arange(size) + torch.rand(size)) / size
    step = (lowest + where * (steps - lowest)).long().clamp(max=steps - 1).to(clean.device)

    alpha = scheduler.alphas_cumprod.to(clean.device)[step][:, None, None, None]
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    noise = torch.randn_like(clean)
    predicted = denoiser(signal * clean + spread * noise, step, *condition)
    return nn.functional.mse_loss(predicted.float(), signal * noise - spread * clean)


def _share(step: int, steps: int) -> float:
    """Factor on the learning rate: a short rise, then a cosine to 0."""
    return min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _shown(steps: Iterable[int], losses: Sequence[float]) -> Iterable[int]:
    """The steps, with a progress bar that tells the mean of the last losses."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("training", total=len(list(steps)))
        for step in steps:
            yield step
            last = losses[-20:]
            bar.update(task, advance=1, description=f"loss {sum(last) / len(last):.4f}")
