"""What each class is compared with: diffusers' own, or a plain LoRA over diffusers' base class."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["LORA_BASES", "reference", "reference_class"]

_MODELS = "diffusers.models"
_FLUX = f"{_MODELS}.transformers.transformer_flux"
_ZERO = "diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero"
_ELSEWHERE = {
    "CrossFrameAttnProcessor": (_ZERO, "CrossFrameAttnProcessor"),
    "FluxAttnProcessor2_0": (_FLUX, "FluxAttnProcessor"),
    "FusedFluxAttnProcessor2_0": (_FLUX, "FluxAttnProcessor"),
    "FluxSingleAttnProcessor2_0": (_FLUX, "FluxAttnProcessor"),
    "XLAFluxFlashAttnProcessor2_0": (_FLUX, "FluxAttnProcessor"),
    "FluxIPAdapterJointAttnProcessor2_0": (_FLUX, "FluxIPAdapterAttnProcessor"),
}
LORA_BASES = {
    "LoRAAttnProcessor": "AttnProcessor",
    "LoRAAttnProcessor2_0": "AttnProcessor2_0",
    "LoRAXFormersAttnProcessor": "XFormersAttnProcessor",
    "LoRAAttnAddedKVProcessor": "AttnAddedKVProcessor",
}


def reference_class(cls: str) -> type:
    """diffusers' class of that name; for Flux the model-local one that its shims make."""
    home, name = _ELSEWHERE.get(cls, (f"{_MODELS}.attention_processor", cls))
    return getattr(importlib.import_module(home), name)


def reference(cls: str, init: Mapping[str, Any]) -> Any:
    """A reference processor with these constructor arguments."""
    if cls in LORA_BASES:
        base = reference_class(LORA_BASES[cls])()
        return NaiveLoRA(base, added=cls == "LoRAAttnAddedKVProcessor", **init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reference_class(cls)(**init)


class LoRALinear(nn.Module):
    """`x -> up(down(x))`."""

    def __init__(self, width: int, out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The low-rank product, unscaled."""
        return self.up(self.down(x))


class Adapted:
    """An attention module seen through a LoRA: its projections changed, all else its own."""

    def __init__(self, attn: Any, changed: Mapping[str, Any]) -> None:
        self._attn = attn
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


class NaiveLoRA(nn.Module):
    """`W x + scale (alpha / rank) up(down(x))` on every projection, then the base processor."""

    def __init__(
        self,
        base: Any,
        added: bool,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        rank: int = 4,
        network_alpha: float | None = None,
    ) -> None:
        super().__init__()
        text = cross_attention_dim or hidden_size
        own = hidden_size if added else text
        widths = {"to_q": hidden_size, "to_k": own, "to_v": own, "to_out": hidden_size}
        widths |= {"add_k_proj": text, "add_v_proj": text} if added else {}
        for name, width in widths.items():
            self.add_module(f"{name}_lora", LoRALinear(width, hidden_size, rank))
        self.names = tuple(widths)
        self.factor = 1.0 if network_alpha is None else network_alpha / rank
        self.base = base

    def __call__(self, attn: Any, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        """The base processor on the adapted module."""
        changed: dict[str, Any] = {}
        for name in self.names:
            low = getattr(self, f"{name}_lora")
            plain = attn.to_out[0] if name == "to_out" else getattr(attn, name)
            if plain is not None:
                changed[name] = _sum(plain, low, scale * self.factor)
        changed["to_out"] = (changed["to_out"], attn.to_out[1])
        return self.base(Adapted(attn, changed), *args, **kwargs)


def _sum(plain: Any, low: LoRALinear, factor: float) -> Callable[[Tensor], Tensor]:
    def projection(x: Tensor) -> Tensor:
        return plain(x) + factor * low(x)

    return projection
