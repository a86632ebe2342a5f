"""Trains the demo model: `python -m attnproc.app.demo.train --data DIR --run DIR`.

v-prediction over squaredcos_cap_v2, AdamW, warm-up and cosine to 0, EMA. Stops and goes on at
will: the run's folder holds all that is needed.
"""

# The libraries used here are typed in part only.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import copy
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional

from attnproc.app.demo import data, model
from attnproc.app.demo.mixing import Batch, Mixer
from attnproc.app.demo.vocabulary import PAD, SPECIAL

__all__ = ["Budget", "Denoiser", "Trainer", "loss"]

STEPS = 1000
CHECKPOINT = "checkpoint.pt"


class Denoiser(nn.Module):
    """The trained half of the pipeline: text encoder and UNet."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder: Any = model.new_text_encoder(vocabulary)
        self.unet: Any = model.new_unet()

    def forward(self, noisy: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
        """Predicts v.

        Args:
            noisy: Latents, [B, 12, 32, 32].
            step: Noise steps, [B].
            tokens: Captions, [B, 24].
        """
        text = self.text_encoder(tokens, attention_mask=(tokens != PAD).long())[0]
        return self.unet(noisy, step, text, return_dict=False)[0]


@dataclass
class Budget:
    """How long to train, in steps or in seconds; the clock runs only while training.

    Attributes:
        steps: Steps altogether, or None.
        seconds: Seconds altogether, or None.
        warmup: Steps of rising rate.
        step: Steps done.
        spent: Seconds done.
    """

    steps: int | None = None
    seconds: float | None = None
    warmup: int = 500
    step: int = 0
    spent: float = 0.0

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        done = self.step / self.steps if self.steps else self.spent / (self.seconds or 1.0)
        return min(done, 1.0)

    @property
    def rate(self) -> float:
        """Factor on the learning rate: linear warm-up, then cosine to 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return min(1.0, (self.step + 1) / self.warmup) * cosine

    @property
    def pairs(self) -> float:
        """Factor on the share of pairs: single things first, pairs soon after."""
        return min(1.0, 0.3 + 2.8 * self.progress)


def loss(denoiser: nn.Module, batch: Batch, alphas: Tensor) -> Tensor:
    """Mean squared error of v at evenly spread random noise steps.

    Args:
        denoiser: Maps noisy latents, steps and tokens to v.
        batch: Pictures and captions.
        alphas: Cumulative products of the schedule, [1000].
    """
    clean = functional.pixel_unshuffle(batch.pictures, 2).contiguous(
        memory_format=torch.channels_last
    )
    size, device = len(clean), clean.device
    # Strata instead of plain draws: each batch sees all noise levels.
    where = (torch.arange(size, device=device) + torch.rand(size, device=device)) / size
    step = (where * STEPS).long().clamp(max=STEPS - 1)

    noise = torch.randn_like(clean)
    alpha = alphas[step][:, None, None, None]
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    predicted = denoiser(signal * clean + spread * noise, step, batch.tokens)
    return functional.mse_loss(predicted.float(), signal * noise - spread * clean)


@dataclass
class Trainer:
    """Everything that changes during training.

    Attributes:
        denoiser: The model.
        mixer: Source of batches.
        budget: Steps and seconds.
        batch: Pictures a step.
        rate: Highest learning rate.
        decay: Decay of the averaged weights.
    """

    denoiser: Denoiser
    mixer: Mixer
    budget: Budget
    batch: int = 512
    rate: float = 1e-3
    decay: float = 0.9995
    average: Denoiser = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        from diffusers import DDPMScheduler

        device = self.mixer.device
        self.denoiser.to(device)
        self.denoiser.unet.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.averages, self.current = [*self.average.parameters()], [*self.denoiser.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.current,
            lr=self.rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )
        schedule = DDPMScheduler(STEPS, beta_schedule=model.SCHEDULER["beta_schedule"])
        self.alphas = schedule.alphas_cumprod.to(device)
        self.forward: nn.Module = self.denoiser

    def compile(self) -> None:
        """Compiles the model and runs it once, outside the budget."""
        self.forward = torch.compile(self.denoiser, mode="reduce-overhead")  # pyright: ignore
        self._backward()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        """One update; returns the loss, still on the device."""
        if self.budget.step % 100 == 0:
            self.mixer.emphasise(self.budget.pairs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.budget.rate
        value = self._backward()
        nn.utils.clip_grad_norm_(self.current, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        # Early on the average must follow faster, or it stays near the random start.
        weight = 1 - min(self.decay, (self.budget.step + 1) / (self.budget.step + 10))
        torch._foreach_lerp_(self.averages, self.current, weight)  # pyright: ignore
        self.budget.step += 1
        return value

    def save(self, run: Path, words: list[str]) -> None:
        """Writes the checkpoint and, from the averaged weights, the model's files."""
        state = {
            "denoiser": self.denoiser.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.budget.step,
            "spent": self.budget.spent,
            "rng": torch.get_rng_state(),
            "device_rng": _device_rng(self.mixer.device),
        }
        run.mkdir(parents=True, exist_ok=True)
        torch.save(state, run / f"{CHECKPOINT}.part")
        (run / f"{CHECKPOINT}.part").replace(run / CHECKPOINT)
        model.save(run / "weights", self.average.unet, self.average.text_encoder, words)

    def resume(self, run: Path) -> bool:
        """Goes on from a checkpoint, if there is one."""
        if not (run / CHECKPOINT).is_file():
            return False
        state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
        self.denoiser.load_state_dict(state["denoiser"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.budget.step, self.budget.spent = state["step"], state["spent"]
        self.mixer.emphasise(self.budget.pairs)
        torch.set_rng_state(state["rng"])
        if state["device_rng"] is not None and self.mixer.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_rng"], self.mixer.device)
        return True

    def _backward(self) -> Tensor:
        device = self.mixer.device.type
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss(self.forward, self.mixer.draw(self.batch), self.alphas)
        value.backward()
        return value.detach()


def _device_rng(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _train(trainer: Trainer, run: Path, words: list[str], *, session: float, every: float) -> None:
    """Runs until the budget or this session's seconds are used, saving on the way."""
    console = Console()
    columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TimeElapsedColumn())
    budget, begun, saved = trainer.budget, time.monotonic(), time.monotonic()
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as bar:
        task = bar.add_task("training", total=1.0, step=budget.step, loss=math.nan)
        losses: list[Tensor] = []
        clock = time.monotonic()
        while budget.progress < 1 and time.monotonic() - begun < session:
            losses.append(trainer.step())
            if budget.step % 10 == 0 and trainer.mixer.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            budget.spent, clock = budget.spent + now - clock, now

            if len(losses) == 200:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                bar.update(task, completed=budget.progress, step=budget.step, loss=mean)
                _log(run, step=budget.step, spent=budget.spent, rate=budget.rate, loss=mean)
            if now - saved > every:
                trainer.save(run, words)
                saved = clock = time.monotonic()
        bar.update(task, completed=budget.progress, step=budget.step)
    trainer.save(run, words)


def _log(run: Path, **values: float) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(values) + "\n")


def main(
    data_folder: Annotated[Path, typer.Option("--data", help="The training set's folder.")],
    run: Annotated[Path, typer.Option(help="Folder of checkpoint, log and weights.")],
    seconds: Annotated[float | None, typer.Option(help="Seconds of training altogether.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps altogether, instead.")] = None,
    session: Annotated[float, typer.Option(help="Seconds until this session stops.")] = math.inf,
    every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120.0,
    batch: Annotated[int, typer.Option(help="Pictures a step.")] = 512,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile/--eager", help="Use torch.compile.")] = True,
    device: Annotated[str | None, typer.Option(help="cuda if there is one, else cpu.")] = None,
) -> None:
    """Trains the demo model, or goes on with a run that was stopped."""
    if (seconds is None) == (steps is None):
        raise typer.BadParameter("give one of --seconds and --steps")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    pictures, entries = data.load(data_folder)
    words = data.vocabulary(entries)
    mixer = Mixer(pictures, entries, device=where, seed=seed)
    denoiser = Denoiser(len(SPECIAL) + len(words))
    trainer = Trainer(denoiser, mixer, Budget(steps, seconds), batch=batch, rate=rate)
    size = sum(parameter.numel() for parameter in denoiser.parameters())
    going_on = trainer.resume(run)
    print(f"{size:,} parameters, {len(words)} words, {where}, from step {trainer.budget.step}")

    if compiled:
        begun = time.monotonic()
        trainer.compile()
        print(f"compiled in {time.monotonic() - begun:.0f} s{', going on' if going_on else ''}")
    _train(trainer, run, words, session=session, every=every)


if __name__ == "__main__":
    typer.run(main)
