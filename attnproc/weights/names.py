"""What published LoRA files call a model's projections.

All names come from the model itself, spelled as each layout spells them, so that nothing has to be
guessed from a key: diffusers and PEFT use module paths, kohya joins them by underscores, and for
SDXL and Flux it names the blocks as their first code bases do, with q, k and v in one layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..interop import processors
from ..linears import PROJECTIONS

__all__ = ["ADDED", "SELF", "Names", "Target", "flux_names", "sgm_name"]

SELF = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

_TEXT_ENCODER = re.compile(r"(lora_te\d?_|text_encoder(_\d)?\.|conditioner\.|cond_stage_model\.)")
_PREFIXES = (
    "base_model.model.",
    "model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
)
# Layers of SDXL's first code base outside its transformers.
_SGM_OTHER = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_")
_FLUX_OTHER = (
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "time_in.out_layer",
    "vector_in.in_layer",
    "vector_in.out_layer",
    "guidance_in.in_layer",
    "guidance_in.out_layer",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)


@dataclass(frozen=True)
class Target:
    """What a layer of a file updates.

    Attributes:
        path: The attention module's path in the model.
        projections: One projection, or those whose rows follow one another in the layer.
        rest: Further rows, which are of a layer outside attention.
    """

    path: str
    projections: tuple[str, ...]
    rest: int = 0


class Names:
    """Finds what a name in a file means for a model."""

    def __init__(self, model: nn.Module) -> None:
        dotted: dict[str, Target | None] = {
            path: None
            for path, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
        }
        dotted.update(_attention_names(model))
        dotted.update(flux_names(model))
        flat = {name.replace(".", "_"): target for name, target in dotted.items()}
        sgm = {sgm_name(name, model).replace(".", "_"): dotted[name] for name in dotted}
        self.known = {**sgm, **flat, **dotted}
        self.has_sgm = sgm.keys() != flat.keys()

    def find(self, name: str) -> Target | str | None:
        """The target of a layer's name, why it is skipped, or None if it is unknown."""
        if _TEXT_ENCODER.match(name):
            return "of a text encoder"
        for short in _shortened(name):
            if short in self.known:
                return self.known[short] or "outside attention"
            if self.has_sgm and _SGM_OTHER.match(short) and "_attn" not in short:
                return "outside attention"
        return None


def _shortened(name: str) -> Iterator[str]:
    """A name, and what is left of it without each prefix that it has."""
    name = name.replace(".processor.", ".")
    yield name
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            yield name


def _attention_names(model: nn.Module) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for path, attn in processors(model):
        for projection in PROJECTIONS:
            layer = getattr(attn, projection, None)
            name = f"{path}.{projection}".lstrip(".")
            if layer is not None:
                found[name] = Target(path, (projection,))
            if isinstance(layer, nn.ModuleList):
                found[f"{name}.0"] = found[name]
    return found


def flux_names(model: nn.Module) -> dict[str, Target | None]:
    """Flux's layers as its first code base and the trainers of XLabs call them."""
    singles: Any = getattr(model, "single_transformer_blocks", ())
    if not singles or not hasattr(singles[0], "proj_mlp"):
        return {}
    doubles: Any = getattr(model, "transformer_blocks", ())
    names: dict[str, Target | None] = dict.fromkeys(_FLUX_OTHER)
    for i in range(len(doubles)):
        path, block = f"transformer_blocks.{i}.attn", f"double_blocks.{i}"
        for stream, number, qkv, out in (
            ("img", 1, SELF, "to_out"),
            ("txt", 2, ADDED, "to_add_out"),
        ):
            names[f"{block}.{stream}_attn.qkv"] = names[f"{block}.qkv{number}"] = Target(path, qkv)
            names[f"{block}.{stream}_attn.proj"] = Target(path, (out,))
            names[f"{block}.proj{number}"] = Target(path, (out,))
            others = (f"{block}.{stream}_{layer}" for layer in ("mlp.0", "mlp.2", "mod.lin"))
            names.update(dict.fromkeys(others))
    for i, single in enumerate(singles):
        path, block = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        names[f"{block}.linear1"] = Target(path, SELF, rest=single.proj_mlp.out_features)
        names[f"{block}.qkv"] = Target(path, SELF)
        others = (f"{block}.{layer}" for layer in ("linear2", "modulation.lin", "proj"))
        names.update(dict.fromkeys(others))
    return names


def sgm_name(path: str, model: nn.Module) -> str:
    """The path of a layer of a U-Net's transformers by the numbers of SDXL's first code base."""
    match = re.match(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?attentions\.(\d+)\.", path)
    if match is None:
        return path
    side, block, layer = match[1], int(match[2] or 0), int(match[3])
    rest = path[match.end() :]
    if side == "mid_block":
        return f"middle_block.{1 + layer}.{rest}"
    blocks: Any = getattr(model, side)
    before = sum(len(b.resnets) for b in blocks[:block]) + layer
    if side == "up_blocks":
        return f"output_blocks.{before}.1.{rest}"
    # One more at the start for the first convolution, and one after each smaller resolution.
    return f"input_blocks.{1 + before + block}.1.{rest}"
