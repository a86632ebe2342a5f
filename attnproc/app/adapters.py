"""What `generate` puts on the demo model: LoRA, Custom Diffusion, an image prompt, guidance."""

from __future__ import annotations

import math
import pickle
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnproc.app.faults import Fault

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from torch import Tensor

__all__ = ["Adapters", "Weighted", "read"]

_SHOWN = 3


@dataclass(frozen=True)
class Weighted:
    """A file and its weight.

    Attributes:
        path: The file.
        weight: The factor on what is in it.
    """

    path: Path
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.path.name} ({self.weight:g})"


@dataclass(frozen=True)
class Adapters:
    """What goes on the model for one run.

    Attributes:
        loras: Files of low-rank updates.
        custom: A file of Custom Diffusion.
        image: The picture that steers the result.
        embedding: That picture's embedding ``[E]``.
        pag: Weight of perturbed-attention guidance; 0 is none.
    """

    loras: tuple[Weighted, ...] = ()
    custom: Weighted | None = None
    image: Weighted | None = None
    embedding: Tensor | None = None
    pag: float = 0.0

    def __str__(self) -> str:
        named = [f"LoRA {lora}" for lora in self.loras]
        named += [f"Custom Diffusion {self.custom.path.name}"] if self.custom else []
        named += [f"picture {self.image}"] if self.image else []
        return ", ".join([*named, *([f"perturbed guidance {self.pag:g}"] if self.pag else [])])

    def put_on(self, pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
        """Puts all on the pipeline's U-Net.

        Returns:
            The pipeline; with guidance by perturbation another of the same parts.

        Raises:
            Fault: A file can't be read or doesn't fit the model; nothing is left half on.
        """
        from attnproc.weights import load_custom_diffusion, load_lora

        if self.custom is not None:
            with _blamed("--custom", self.custom.path):
                load_custom_diffusion(pipeline.unet, self.custom.path)
        for i, lora in enumerate(self.loras, start=1):
            with _blamed("--lora", lora.path):
                load_lora(pipeline.unet, lora.path, f"lora_{i}", lora.weight)
        if self.image is not None:
            from attnproc.app.image_prompt import FILE, put_on

            with _blamed("demo model:", FILE):
                put_on(pipeline.unet, self.image.weight)
        if not self.pag:
            return pipeline
        from attnproc.app.guided import Guided

        return Guided.of(pipeline)

    def inputs(self, guidance: float) -> dict[str, Any]:
        """What the pipeline's call takes for them."""
        given: dict[str, Any] = {"pag_scale": self.pag} if self.pag else {}
        if self.embedding is None:
            return given
        from torch import stack, zeros_like

        # As in training, no picture is zeros.
        rows = [zeros_like(self.embedding), self.embedding] if guidance > 1 else [self.embedding]
        return {**given, "ip_adapter_image_embeds": [stack(rows)[:, None]]}


def read(
    loras: Sequence[str], custom: Path | None, image: str | None, pag: float = 0.0
) -> Adapters:
    """Reads the options, and the picture; other files are there, but not read yet.

    Args:
        loras: Files of low-rank updates, each as ``FILE`` or ``FILE:WEIGHT``.
        custom: A file of Custom Diffusion.
        image: A picture, as ``FILE`` or ``FILE:SCALE``.
        pag: Weight of perturbed-attention guidance.

    Raises:
        Fault: A file is missing, a weight is no number, or the picture can't be read.
    """
    found = tuple(_weighted("--lora", text) for text in loras)
    own = None if custom is None else Weighted(_there("--custom", custom))
    if image is None:
        return Adapters(found, own, pag=pag)
    picture = _weighted("--image", image)
    return Adapters(found, own, picture, _embedding(picture.path), pag)


def _weighted(option: str, text: str) -> Weighted:
    path, _, number = text.rpartition(":")
    if not path or Path(text).exists():
        return Weighted(_there(option, Path(text)))
    try:
        weight = float(number)
    except ValueError:
        return Weighted(_there(option, Path(text)))
    if not math.isfinite(weight):
        raise Fault(f"{option} {text}: the weight is {number}, give a finite number")
    return Weighted(_there(option, Path(path)), weight)


def _there(option: str, path: Path) -> Path:
    if not path.exists():
        raise Fault(f"{option} {path}: there is no such file")
    return path


def _embedding(path: Path) -> Tensor:
    import torch
    from numpy import asarray
    from PIL import Image

    from attnproc.app.image_prompt import embeddings

    try:
        picture = Image.open(path).convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise Fault(f"--image {path}: it can't be read as a picture") from error
    whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return embeddings(torch.from_numpy(asarray(whole.convert("RGB")).copy())[None])[0]


@contextmanager
def _blamed(option: str, path: Path) -> Generator[None]:
    """Makes one line, with the option and the file, of what is wrong with a file."""
    from safetensors import SafetensorError

    # What torch.load raises for bytes that are no file of it depends on the bytes.
    damage = (OSError, RuntimeError, LookupError, TypeError, AttributeError, EOFError)
    try:
        yield
    except ValueError as error:
        raise Fault(f"{option} {path}: {_short(error)}") from error
    except (*damage, pickle.UnpicklingError, SafetensorError) as error:
        raise Fault(f"{option} {path}: it can't be read ({_short(error)})") from error


def _short(error: Exception) -> str:
    first, *others = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    more = [f"and {len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
    return " ".join([first, "; ".join([*others[:_SHOWN], *more])]).strip()
