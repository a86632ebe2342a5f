"""Loading the demo model and making pictures with it."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnproc.app.faults import Fault
from attnproc.app.ranks import first, own_device

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from PIL.Image import Image

__all__ = ["Clock", "Hook", "Request", "load", "paint", "progress"]

Tick = Callable[[], None]
Hook = Callable[[Any, int, Any, "dict[str, Any]"], "dict[str, Any]"]
"""A pipeline's `callback_on_step_end`."""


@dataclass(frozen=True)
class Request:
    """What to paint.

    Attributes:
        prompt: The words.
        seed: Seed of the first picture; each further one has the next.
        steps: Denoising steps.
        guidance: Weight of the prompt; 1 is none beyond the model's own.
        batch: How many pictures.
    """

    prompt: str
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    batch: int = 1

    def __str__(self) -> str:
        pictures = f"{self.batch} pictures, " if self.batch > 1 else ""
        return f"{pictures}{self.steps} steps, guidance {self.guidance:g}, seed {self.seed}"


def load(device: str) -> StableDiffusionPipeline:
    """The demo model, with no output of its own.

    Raises:
        Fault: Its weights are missing or damaged, or the device is not there.
    """
    import torch

    _check_device(device)
    _leave_busy_processors()
    with _silence():
        from attnproc.app.demo import model, vocabulary

        try:
            pipeline = model.load(own_device(device), torch.float32, folder=vocabulary.WEIGHTS)
        except model.DemoWeightsError as error:
            raise Fault(str(error)) from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise Fault(f"demo model: damaged ({_first(error)}); reinstall attnproc") from error
    bare: Any = pipeline
    bare.set_progress_bar_config(disable=True)
    return pipeline


def paint(
    pipeline: StableDiffusionPipeline,
    request: Request,
    tick: Tick,
    inputs: Mapping[str, Any] | None = None,
    hooks: Sequence[Hook] = (),
) -> list[Image]:
    """Makes the pictures.

    Args:
        pipeline: The demo model.
        request: What to paint.
        tick: Called after each step.
        inputs: Further arguments of the pipeline's call, also in place of its own.
        hooks: Called after each step, one after another.

    Returns:
        RGB pictures in the model's own size.
    """
    import torch

    run: Any = pipeline
    given = {"prompt": [request.prompt] * request.batch, **(inputs or {})}
    rows = len(given["prompt"] or given["prompt_embeds"])
    # Rows before the pictures, such as a reference, don't take their seeds.
    seeds = range(request.seed - (rows - request.batch), request.seed + request.batch)

    def after_step(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tick()
        for hook in hooks:
            tensors = hook(pipe, step, time, tensors)
        return tensors

    with _silence(), torch.inference_mode():
        result = run(
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=[torch.Generator().manual_seed(max(seed, 0)) for seed in seeds],
            callback_on_step_end=after_step,
            **given,
        )
    return result.images


@contextmanager
def progress(steps: int) -> Generator[Callable[[str], Tick]]:
    """A bar on the terminal while the block runs.

    Yields:
        What starts a stage of so many steps by its name, and returns the tick of its steps; until
        it is called, the model is loading.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and first()),
    ) as bar:
        task = bar.add_task("loading the model", total=None)

        def stage(name: str) -> Tick:
            bar.reset(task, description=name, total=steps)
            return lambda: bar.advance(task)

        yield stage


@contextmanager
def _silence() -> Generator[None]:
    """Keeps warnings of the libraries about their own insides off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_device(device: str) -> None:
    import torch

    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise Fault(f"device {device!r} is none that torch knows, such as cpu or cuda") from error
    try:
        torch.empty(1, device=known)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise Fault(f"device {device!r} can't be used here: {_first(error)}") from error


def _leave_busy_processors() -> None:
    """Takes no more threads than there are idle processors.

    torch's threads turn while they wait for each other. Where others use the processors, a step
    takes a hundred times as long with two threads as with one.
    """
    import torch

    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" or not hasattr(os, "getloadavg"):
        return
    idle = round((os.cpu_count() or 1) - os.getloadavg()[0])
    torch.set_num_threads(max(1, min(torch.get_num_threads(), idle)))


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start
