"""Files of tensors, and the one error that lists all that is wrong with one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Problems", "Source", "opened", "written"]

Source = str | os.PathLike[str] | Mapping[str, Any]

# What diffusers and PEFT call the weights in a directory of theirs.
_NAMES = ("adapter_model", "pytorch_lora_weights", "pytorch_custom_diffusion_weights")
_SETTINGS = "lora_adapter_metadata"


class Problems:
    """Collects what is wrong, so that one error lists it all.

    Args:
        what: What is being read, for the error's first line.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.found: list[str] = []

    def add(self, key: str, why: str) -> None:
        """Notes a problem with one key of the file."""
        self.found.append(f"{key}: {why}")

    def shape(self, key: str, got: Tensor, need: tuple[int | None, ...]) -> bool:
        """Whether a tensor has a shape, in which None is any number; notes it if not."""
        fits = got.ndim == len(need) and all(
            n in (None, size) for n, size in zip(need, got.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in need)
            self.add(key, f"shape {tuple(got.shape)}, need ({wanted})")
        return fits

    def check(self) -> None:
        """Raises if there are any.

        Raises:
            ValueError: Lists them all.
        """
        if self.found:
            raise ValueError(f"{self.what} does not fit the model:\n  " + "\n  ".join(self.found))


def opened(file: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a file and the settings that came with it.

    Args:
        file: A safetensors file, a file of `torch.save` (of which nothing but tensors and plain
            containers is read), a directory of diffusers or PEFT, or a state dict.

    Returns:
        The tensors by key (dicts of them where the file is nested), and the settings: those in
        the file's metadata or in an ``adapter_config.json`` beside it.
    """
    if isinstance(file, Mapping):
        return dict(file), {}
    path = _weights_in(Path(file))
    beside = path.parent / "adapter_config.json"
    settings = json.loads(beside.read_text()) if beside.is_file() else {}
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True), settings
    with _safetensors().safe_open(path, framework="pt", device="cpu") as opened_file:
        tensors = {key: opened_file.get_tensor(key) for key in opened_file.keys()}  # noqa: SIM118
        inside = (opened_file.metadata() or {}).get(_SETTINGS)
    return tensors, json.loads(inside) if inside else settings


def written(
    file: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes tensors as safetensors, with settings in the metadata as diffusers keeps them."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if settings:
        metadata[_SETTINGS] = json.dumps(settings, indent=2, sort_keys=True)
    # Each its own storage: a file of views would be refused, or hold the same rows twice.
    own = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    _safetensors().torch.save_file(own, path, metadata=metadata)


def _weights_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = [name + end for name in _NAMES for end in (".safetensors", ".bin")]
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} has no weights, possible are {', '.join(names)}")
    return found


def _safetensors() -> Any:
    try:
        import_module("safetensors.torch")
        return import_module("safetensors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "safetensors is not installed: pip install safetensors", name="safetensors"
        ) from error
