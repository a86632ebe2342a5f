"""Image prompts and Custom Diffusion's projections of a model, written as diffusers reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..interop import processors
from ..prompts import joint_decoupled
from .files import written
from .ip_adapter import Layout, numbered

__all__ = ["save_custom_diffusion", "save_ip_adapter"]


def save_ip_adapter(
    model: nn.Module,
    file: str | os.PathLike[str],
    image_projection: Mapping[str, Tensor],
    *,
    prompt: int = 0,
) -> None:
    """Writes one of a model's image prompts as an IP-Adapter.

    Args:
        model: The model that holds it.
        file: A safetensors file.
        image_projection: What makes tokens of image embeddings, as `IPAdapterFile` has it.
        prompt: Which of the prompts.

    Raises:
        ValueError: The model has no such prompt, or not in all layers that the layout numbers.
    """
    layers = dict(_prompts(model, prompt))
    if not layers:
        raise ValueError(f"prompt {prompt}: the model has no image prompt of that number")
    layout = _layout(model, layers)
    numbers = {path: number for number, path in numbered(model, layout)}
    if numbers.keys() != layers.keys():
        odd = sorted(numbers.keys() ^ layers.keys())
        raise ValueError(
            f"the layout {layout!r} numbers the layers, so each of them needs the prompt and no "
            f"other may have one; these don't fit: {', '.join(odd)}"
        )
    tensors = {f"image_proj.{key}": tensor for key, tensor in image_projection.items()}
    for path, named in layers.items():
        tensors.update({f"ip_adapter.{numbers[path]}.{k}": v for k, v in named.items()})
    written(file, tensors)


def _prompts(model: nn.Module, prompt: int) -> Any:
    """The paths of layers with an image prompt, each with the prompt's tensors."""
    for path, attn in processors(model):
        proc: Any = attn.processor
        keys = getattr(proc, "to_k_ip", None)
        if isinstance(keys, nn.Linear):
            yield path, _own(proc, ("to_k_ip", "to_v_ip", "norm_"), "")
        elif keys is not None and prompt < len(keys):
            yield path, _own(proc, (f"to_k_ip.{prompt}.", f"to_v_ip.{prompt}."), f".{prompt}")


def _own(proc: nn.Module, prefixes: tuple[str, ...], number: str) -> dict[str, Tensor]:
    state = proc.state_dict()
    return {
        k.replace(f"_ip{number}.", "_ip."): v for k, v in state.items() if k.startswith(prefixes)
    }


def _layout(model: nn.Module, layers: Mapping[str, Mapping[str, Tensor]]) -> Layout:
    path, tensors = next(iter(layers.items()))
    attn: Any = model.get_submodule(path)
    if joint_decoupled in getattr(getattr(attn.processor, "recipe", None), "prompts", ()):
        return "sd3"
    return "flux" if "to_k_ip.bias" in tensors else "unet"


def save_custom_diffusion(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Writes a model's projections of Custom Diffusion.

    diffusers' `load_attn_procs` wants to hear of every layer, also of those without projections,
    which safetensors can't tell: give a ``.bin`` file for it where not all layers have some.

    Args:
        model: The model that holds them.
        file: A file of safetensors, or of `torch.save` if it is called ``.bin``.

    Raises:
        ValueError: The model has none.
    """
    tensors: dict[str, Any] = {}
    for path, attn in processors(model):
        name = f"{path}.processor"
        state = attn.processor.state_dict() if isinstance(attn.processor, nn.Module) else {}
        own = {f"{name}.{k}": v for k, v in state.items() if "_custom_diffusion." in k}
        tensors.update(own or {name: {}})
    with_weights = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not with_weights:
        raise ValueError("the model has no projections of Custom Diffusion")
    if Path(file).suffix == ".bin":
        torch.save(tensors, file)
    else:
        written(file, with_weights)
