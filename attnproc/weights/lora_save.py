"""Low-rank updates of a model, written in the layouts that others read."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..interop import processors
from ..linears import PROJECTIONS, LoRA, LoRALinear, widths
from .files import written
from .lora import LoRAWeights
from .names import Target, flux_names, sgm_name

__all__ = ["lora_of", "save_lora"]

Layout = Literal["diffusers", "peft", "kohya"]
Layers = Mapping[str, Mapping[str, LoRAWeights]]


def save_lora(
    model: nn.Module,
    file: str | os.PathLike[str],
    name: str = "style",
    layout: Layout = "diffusers",
) -> None:
    """Writes a model's low-rank updates of a name.

    Args:
        model: The model that holds them.
        file: A safetensors file; for "peft" a directory, which gets ``adapter_config.json`` too.
        name: What the updates are called.
        layout: "diffusers" for its pipelines' `load_lora_weights`, "peft" for
            `PeftModel.from_pretrained`, "kohya" for most other programs (U-Nets and Flux).

    Raises:
        ValueError: There are no such updates, or `layout` is none of these for this model.
    """
    layers = lora_of(model, name)
    if layout == "diffusers":
        component = "unet" if hasattr(model, "down_blocks") else "transformer"
        settings = {f"{component}.{k}": v for k, v in _settings(model, layers).items()}
        written(file, _named(model, layers, f"{component}."), settings)
    elif layout == "peft":
        written(
            Path(file) / "adapter_model.safetensors", _named(model, layers, "base_model.model.")
        )
        config = {"peft_type": "LORA", "inference_mode": True, **_settings(model, layers)}
        (Path(file) / "adapter_config.json").write_text(json.dumps(config, indent=2))
    elif layout == "kohya" and (hasattr(model, "down_blocks") or flux_names(model)):
        written(file, _kohya(model, layers))
    else:
        possible = "'diffusers', 'peft', and for U-Nets and Flux 'kohya'"
        raise ValueError(f"layout is {layout!r}, possible are {possible}")


def lora_of(model: nn.Module, name: str) -> dict[str, dict[str, LoRAWeights]]:
    """A model's low-rank updates of a name, by path and projection.

    Raises:
        ValueError: There are none.
    """
    found: dict[str, dict[str, LoRAWeights]] = {}
    for path, attn in processors(model):
        for projection in PROJECTIONS:
            update = getattr(attn.processor, f"{projection}_{LoRA(name).suffix}", None)
            if isinstance(update, LoRALinear):
                weights = LoRAWeights(update.down.weight, update.up.weight, update.network_alpha)
                found.setdefault(path, {})[projection] = weights
    if not found:
        raise ValueError(f"name {name!r}: the model has no low-rank updates of that name")
    return found


def _each(model: nn.Module, layers: Layers) -> Iterable[tuple[str, LoRAWeights]]:
    """The updates by the path of the layer that they are for."""
    for path, updates in layers.items():
        attn = model.get_submodule(path)
        for projection, weights in updates.items():
            number = ".0" if isinstance(getattr(attn, projection), nn.ModuleList) else ""
            yield f"{path}.{projection}{number}".lstrip("."), weights


def _named(model: nn.Module, layers: Layers, prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, weights in _each(model, layers):
        tensors[f"{prefix}{layer}.lora_A.weight"] = weights.down
        tensors[f"{prefix}{layer}.lora_B.weight"] = weights.up
    return tensors


def _settings(model: nn.Module, layers: Layers) -> dict[str, Any]:
    """Ranks and factors as PEFT's settings: the most frequent, and the layers that differ."""
    ranks = {layer: weights.down.shape[0] for layer, weights in _each(model, layers)}
    alphas = {
        layer: ranks[layer] if weights.alpha is None else weights.alpha
        for layer, weights in _each(model, layers)
    }
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {layer: r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {layer: a for layer, a in alphas.items() if a != alpha},
        "target_modules": list(ranks),
    }


def _kohya(model: nn.Module, layers: Layers) -> dict[str, Tensor]:
    """The updates under kohya's names; Flux' q, k and v of a stream in one layer."""
    updates = dict(_flux_layers(model, layers) or _each(model, layers))
    alphas = {layer: weights.factor * len(weights.down) for layer, weights in updates.items()}
    # diffusers 0.42 applies one alpha to all attention layers, so they get one that they share.
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    # SDXL is the U-Net that kohya's scripts train in its first code base.
    is_sgm = hasattr(model, "add_embedding")

    tensors: dict[str, Tensor] = {}
    for layer, weights in updates.items():
        name = sgm_name(layer, model) if is_sgm else layer
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = weights.down
        tensors[f"{stem}.lora_up.weight"] = weights.up * (alphas[layer] / alpha)
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _flux_layers(model: nn.Module, layers: Layers) -> list[tuple[str, LoRAWeights]]:
    found: list[tuple[str, LoRAWeights]] = []
    for name, target in flux_names(model).items():
        # The other spelling of the same layers is that of XLabs' trainers.
        is_kohya = "_attn." in name or name.endswith(".linear1")
        updates = layers.get(target.path, {}) if target and is_kohya else {}
        if target and any(projection in updates for projection in target.projections):
            found.append((name, _joined(target, updates, model)))
    return found


def _joined(target: Target, updates: Mapping[str, LoRAWeights], model: nn.Module) -> LoRAWeights:
    """One update for the rows of several projections."""
    sizes = widths(model.get_submodule(target.path), target.projections)
    given = [updates[p] for p in target.projections if p in updates]
    if len(target.projections) == 1:
        return given[0]

    first = given[0]
    alike = all(weights.factor == first.factor for weights in given)
    shared = alike and all(torch.equal(weights.down, first.down) for weights in given)
    rank = first.down.shape[0] if shared else sum(weights.down.shape[0] for weights in given)
    rows = sum(out for _, out in sizes.values()) + target.rest
    up, row, column = first.up.new_zeros(rows, rank), 0, 0
    for projection, (_, out) in sizes.items():
        weights = updates.get(projection)
        if weights is not None:
            # A common factor stays a factor; different ones go into the rows.
            own = weights.up.detach() * (1.0 if alike else weights.factor)
            up[row : row + out, column : column + own.shape[1]] = own
            column += 0 if shared else own.shape[1]
        row += out
    down = first.down if shared else torch.cat([weights.down for weights in given])
    return LoRAWeights(down, up, first.factor * rank if alike else None)
