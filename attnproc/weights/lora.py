"""Low-rank updates as published: by diffusers, by PEFT, by kohya's scripts and XLabs'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linears import widths
from .alphas import Alphas
from .files import Problems, Source, opened
from .names import Names, Target

__all__ = ["LoRAFile", "LoRAWeights", "read_lora"]


class LoRAWeights(NamedTuple):
    """The update ``(alpha / rank) up down`` of one projection."""

    down: Tensor
    """``[rank, input width]``."""
    up: Tensor
    """``[output width, rank]``."""
    alpha: float | None = None
    """None is the rank, so a factor of 1."""

    @property
    def factor(self) -> float:
        """``alpha / rank``."""
        return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]


@dataclass(frozen=True)
class LoRAFile:
    """What a file of low-rank updates holds for a model.

    Attributes:
        layers: The updates by the attention module's path and the projection's name.
        skipped: Why a key is not used; nothing is left out without a line here.
        layout: Which layout the file has.
    """

    layers: dict[str, dict[str, LoRAWeights]]
    skipped: dict[str, str] = field(default_factory=dict)
    layout: str = "diffusers"

    def __str__(self) -> str:
        updates = sum(map(len, self.layers.values()))
        lines = [f"{updates} updates in {len(self.layers)} attention modules ({self.layout})"]
        reasons = list(self.skipped.values())
        lines += [f"{reasons.count(why)} keys skipped: {why}" for why in dict.fromkeys(reasons)]
        return "\n".join(lines)


def read_lora(
    file: Source, model: nn.Module, settings: Mapping[str, Any] | None = None
) -> LoRAFile:
    """Reads low-rank updates, whatever layout they were published in.

    Args:
        file: A file or directory (see `attnproc.weights.files.opened`) or a state dict.
        model: The model they are for, or a part of it; its layers say what the keys mean.
        settings: What an ``adapter_config.json`` says, where the file does not come with it.

    Returns:
        The updates of attention projections, and why other keys were skipped.

    Raises:
        ValueError: Keys are unknown, missing or of the wrong shape; all of them are listed.
    """
    tensors, found = opened(file)
    problems = Problems("LoRA")
    names = Names(model)
    parts, skipped = _sorted(tensors, names, problems)
    if not parts and not problems.found:
        problems.add("no key", "updates an attention projection of this model")
    problems.check()

    alphas = Alphas(settings if settings is not None else found, problems)
    layers: dict[str, dict[str, LoRAWeights]] = {}
    for target, given in parts.items():
        for projection, weights in _updates(target, given, model, alphas, problems).items():
            layer = layers.setdefault(target.path, {})
            if projection in layer:
                problems.add(given.name, f"{target.path}.{projection} is updated twice")
            layer[projection] = weights
        if target.rest:
            skipped[given.name] = f"its last {target.rest} rows are outside attention"
    problems.check()
    return LoRAFile(layers, skipped, _layout(tensors))


class Given:
    """The tensors of one layer of a file, by "down", "up" and "alpha"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, Tensor] = {}
        self.keys: dict[str, str] = {}


_PART = re.compile(
    r"(?P<name>.+)[._]lora(?:_linear_layer)?(?P<number>[12]?)[._]"
    r"(?P<part>down|up|A|B)(?:\.\w+)?\.weight"
)
_ALPHA = re.compile(r"(?P<name>.+?)(?:[._]lora)?\.alpha")
_OTHER = re.compile(
    r"(?P<name>.+?)[._](?P<kind>dora_scale|lora_magnitude_vector|hada_|lokr_|oft_|diff|"
    r"lora_B(?:\.\w+)?\.bias)"
)
_KINDS = {"A": "down", "B": "up"}


def _sorted(
    tensors: Mapping[str, Any], names: Names, problems: Problems
) -> tuple[dict[Target, Given], dict[str, str]]:
    """The tensors of each target, and the reasons of keys that have none."""
    parts: dict[Target, Given] = {}
    skipped: dict[str, str] = {}
    for key, tensor in tensors.items():
        name, part = _parsed(key)
        target = names.find(name)
        if isinstance(target, str):
            skipped[key] = target
        elif target is None:
            problems.add(key, "is unknown")
        elif part not in ("down", "up", "alpha"):
            problems.add(key, f"{part} is not supported, only plain low-rank updates are")
        else:
            given = parts.setdefault(target, Given(name))
            if part in given.tensors:
                problems.add(key, f"says the same as {given.keys[part]}")
            given.tensors[part], given.keys[part] = tensor, key
    return parts, skipped


def _parsed(key: str) -> tuple[str, str]:
    """The layer's name in a key, and which part of its update the key is."""
    if match := _PART.fullmatch(key):
        return match["name"] + match["number"], _KINDS.get(match["part"], match["part"])
    if match := _ALPHA.fullmatch(key):
        return match["name"], "alpha"
    if match := _OTHER.match(key):
        return match["name"], match["kind"]
    return key, "such a key"


def _updates(
    target: Target, given: Given, model: nn.Module, alphas: Alphas, problems: Problems
) -> dict[str, LoRAWeights]:
    """The update of each projection of a target, if all is there and fits."""
    missing = [part for part in ("down", "up") if part not in given.tensors]
    for part in missing:
        problems.add(given.name, f"its {part} matrix is missing")
    if missing:
        return {}

    down, up = given.tensors["down"], given.tensors["up"]
    sizes = widths(model.get_submodule(target.path), target.projections)
    wide = next(iter(sizes.values()))[0]
    rows = [out for _, out in sizes.values()]
    fits = problems.shape(given.keys["down"], down, (None, wide))
    rank = down.shape[0] if down.ndim else None
    if not problems.shape(given.keys["up"], up, (sum(rows) + target.rest, rank)) or not fits:
        return {}

    alpha = given.tensors.get("alpha")
    parts = up.split([*rows, target.rest])[: len(rows)]
    return {
        projection: LoRAWeights(
            down,
            part,
            alphas.of(f"{target.path}.{projection}", down.shape[0])
            if alpha is None
            else float(torch.as_tensor(alpha)),
        )
        for projection, part in zip(target.projections, parts, strict=True)
    }


def _layout(tensors: Mapping[str, Any]) -> str:
    """What a file's layout is called, by how its keys are spelled."""
    signs = {
        "peft": "base_model.model.",
        "kohya": ".lora_down.",
        "xlabs": "_blocks.0.processor.",
        "attn_procs": "_lora.down.",
    }
    return next(
        (name for name, sign in signs.items() if any(sign in k for k in tensors)), "diffusers"
    )
