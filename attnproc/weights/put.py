"""Read weights onto a model: the only place that changes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..interop import put, swap
from ..linears import LoRA, LoRALinear
from ..processor import Processor
from ..prompts import Scale
from ..schedules import Weight
from .custom_diffusion import CustomDiffusionFile, read_custom_diffusion
from .files import Source
from .ip_adapter import IPAdapterFile, read_ip_adapter
from .lora import LoRAFile, LoRAWeights, read_lora

__all__ = ["load_custom_diffusion", "load_ip_adapter", "load_lora"]


def load_lora(
    model: nn.Module, file: Source | LoRAFile, name: str = "style", weight: Weight = 1.0
) -> LoRAFile:
    """Puts low-rank updates on a model's attention.

    Args:
        model: The model; modules that get an update get our processor, if they have another.
        file: What `read_lora` reads, or what it read.
        name: What the updates are called: `without(name)` takes them off again.
        weight: Their weight.

    Returns:
        What was read, and what of it was skipped.

    Raises:
        ValueError: The file doesn't fit the model, or it has updates of that name already.
    """
    read = file if isinstance(file, LoRAFile) else read_lora(file, model)
    _put(model, read.layers, lambda attn, updates: _updated(attn, updates, name, weight))
    return read


def load_ip_adapter(
    model: nn.Module, file: Source | IPAdapterFile, scale: Scale = 1.0, *, faces: str = "faceid"
) -> IPAdapterFile:
    """Puts an image prompt on a model's attention, after those that it has.

    The model's own image projection stays what it is: hand the image's tokens to the model
    (``(text, [tokens])`` as context of a U-Net, `ip_hidden_states` to others), or load with
    diffusers first and `swap`.

    Args:
        model: The model; modules that get the prompt get our processor, if they have another.
        file: What `read_ip_adapter` reads, or what it read.
        scale: The prompt's weight.
        faces: What low-rank updates are called that come with prompts of faces.

    Raises:
        ValueError: The file doesn't fit the model, or the model has a prompt of another kind.
    """
    read = file if isinstance(file, IPAdapterFile) else read_ip_adapter(file, model)
    _put(model, read.layers, lambda attn, tensors: _prompted(attn, tensors, read, scale))
    if read.lora is not None:
        load_lora(model, read.lora, faces)
    return read


def load_custom_diffusion(
    model: nn.Module, file: Source | CustomDiffusionFile
) -> CustomDiffusionFile:
    """Puts projections of Custom Diffusion on a model's attention.

    Args:
        model: The model; modules that get projections get our processor, if they have another.
        file: What `read_custom_diffusion` reads, or what it read.

    Raises:
        ValueError: The file doesn't fit the model, or the model has such projections already.
    """
    read = file if isinstance(file, CustomDiffusionFile) else read_custom_diffusion(file, model)
    _put(model, read.layers, _customised)
    return read


T = TypeVar("T")


def _put(
    model: nn.Module, layers: Mapping[str, T], changed: Callable[[Any, T], Processor]
) -> None:
    """Puts a changed processor on each attention module of `layers`, or on none if one fails."""
    attns: dict[str, Any] = {path: model.get_submodule(path) for path in layers}
    for path, attn in attns.items():
        if not isinstance(attn.processor, Processor):
            kept = swap(attn).kept
            if kept:
                raise ValueError(f"{path}: {kept['']}, so nothing can be put on it")
    new = {path: changed(attn, layers[path]) for path, attn in attns.items()}
    for path, attn in attns.items():
        put(attn, new[path])


def _updated(
    attn: Any, updates: Mapping[str, LoRAWeights], name: str, weight: Weight
) -> Processor:
    proc = attn.processor.with_lora(attn, name, weight=weight, projections=tuple(updates))
    for projection, weights in updates.items():
        layer = f"{projection}_{LoRA(name).suffix}"
        setattr(proc, layer, _linear(weights, getattr(proc, layer).down.weight))
    return proc


def _linear(weights: LoRAWeights, like: Tensor) -> LoRALinear:
    """An update with a copy of the weights, on the device and in the dtype of `like`."""
    down, up = (w.detach().to(like, copy=True) for w in (weights.down, weights.up))
    with torch.device("meta"):
        layer = LoRALinear(down.shape[1], up.shape[0], down.shape[0], weights.alpha)
    layer.load_state_dict({"down.weight": down, "up.weight": up}, assign=True)
    return layer


def _prompted(
    attn: Any, tensors: Mapping[str, Tensor], file: IPAdapterFile, scale: Scale
) -> Processor:
    width = tensors["to_k_ip.weight"].shape[1]
    if file.layout == "sd3":
        temb = tensors["norm_ip.linear.weight"].shape[1]
        proc = attn.processor.with_joint_ip_adapter(attn, width, temb, scale)
        named = dict(tensors)
    else:
        bias = file.layout == "flux"
        proc = attn.processor.with_ip_adapter(attn, width, file.num_tokens, scale, bias=bias)
        last = len(proc.to_k_ip) - 1
        named = {k.replace("_ip.", f"_ip.{last}."): v for k, v in tensors.items()}
    return _filled(proc, named)


def _customised(attn: Any, tensors: Mapping[str, Tensor]) -> Processor:
    has_q_out = "to_q_custom_diffusion.weight" in tensors
    bias = "to_out_custom_diffusion.0.bias" in tensors
    proc = attn.processor.with_custom_diffusion(attn, train_q_out=has_q_out, out_bias=bias)
    return _filled(proc, tensors)


@torch.no_grad()
def _filled(proc: Processor, tensors: Mapping[str, Tensor]) -> Processor:
    """The processor with tensors copied to its parameters of those names."""
    for name, tensor in tensors.items():
        proc.get_parameter(name).copy_(tensor)
    return proc
