"""What the settings beside a LoRA file say about its factors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .files import Problems

__all__ = ["Alphas"]

# Settings of PEFT with which an update is something else than `up(down(x))`.
_UNSUPPORTED = ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save")
_COMPONENTS = ("unet.", "transformer.")


class Alphas:
    """The `alpha` of each layer by PEFT's settings.

    Args:
        settings: An ``adapter_config.json``, or what diffusers keeps in a file's metadata, where
            each setting is led by the pipeline's component.
        problems: Takes note of settings that are not supported.
    """

    def __init__(self, settings: Mapping[str, Any], problems: Problems) -> None:
        self.settings = {_plain(name): value for name, value in settings.items()}
        for name in _UNSUPPORTED:
            if self.settings.get(name):
                problems.add(f"setting {name}", f"{self.settings[name]} is not supported")

    def of(self, layer: str, rank: int) -> float | None:
        """The `alpha` of a layer, by its path; None if the settings have none."""
        patterns: Mapping[str, float] = self.settings.get("alpha_pattern") or {}
        special = (alpha for name, alpha in patterns.items() if _is_of(name, layer))
        alpha = next(special, self.settings.get("lora_alpha"))
        if alpha is None or not self.settings.get("use_rslora"):
            return alpha
        return alpha * math.sqrt(rank)


def _plain(name: str) -> str:
    for component in _COMPONENTS:
        name = name.removeprefix(component)
    return name


def _is_of(pattern: str, layer: str) -> bool:
    # Settings name a list's linear layer with its number, the model's layer goes without.
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in (layer, f"{layer}.0"))
