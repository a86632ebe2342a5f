"""Image prompts as published: IP-Adapter for Stable Diffusion and SDXL, Flux, SD3."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..interop import processors
from ..linears import widths
from .files import Problems, Source, opened
from .lora import LoRAFile, LoRAWeights

__all__ = ["IPAdapterFile", "numbered", "read_ip_adapter"]

Layout = Literal["unet", "flux", "sd3"]

_KV = ("to_k_ip.weight", "to_v_ip.weight")
_KEYS = {
    "unet": _KV,
    "flux": (*_KV, "to_k_ip.bias", "to_v_ip.bias"),
    "sd3": (
        *_KV,
        "norm_ip.linear.weight",
        "norm_ip.linear.bias",
        "norm_q.weight",
        "norm_k.weight",
        "norm_ip_k.weight",
    ),
}
# XLabs' names for Flux, as they were published.
_XLABS = {
    "ip_adapter_proj_model.": "image_proj.",
    "double_blocks.": "ip_adapter.",
    ".processor.": ".",
    "ip_adapter_double_stream_k_proj": "to_k_ip",
    "ip_adapter_double_stream_v_proj": "to_v_ip",
}
_UNCOUNTED = re.compile(r"(image_proj|encoder_hid_proj)\.|.*motion_modules\.")
_LORA = re.compile(r"(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")


@dataclass(frozen=True)
class IPAdapterFile:
    """What an IP-Adapter file holds for a model.

    Attributes:
        layout: "unet", "flux" or "sd3".
        layers: The tensors of each layer by the attention module's path, in the file's order:
            ``to_k_ip.weight``, ``to_v_ip.weight``, Flux's biases, SD3's norms.
        image_projection: What makes tokens of image embeddings, with the file's own keys.
        num_tokens: How many tokens one image gives.
        lora: The low-rank updates that come with prompts of faces.
    """

    layout: Layout
    layers: dict[str, dict[str, Tensor]]
    image_projection: dict[str, Tensor]
    num_tokens: int
    lora: LoRAFile | None = field(default=None)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The nested form that diffusers' `load_ip_adapter` takes; without the low-rank updates.

        Layers are numbered as the published files number them.
        """
        step, start = (2, 1) if self.layout == "unet" else (1, 0)
        layers = {
            f"{start + step * i}.{key}": tensor
            for i, tensors in enumerate(self.layers.values())
            for key, tensor in tensors.items()
        }
        return {"image_proj": dict(self.image_projection), "ip_adapter": layers}

    def tokens(self, embeds: Tensor) -> Tensor:
        """Image tokens ``[B, num_tokens, C]`` of embeddings ``[B, E]`` by a plain projection.

        Raises:
            ValueError: The projection is of another kind (a resampler, a face's).
        """
        weights = self.image_projection
        if set(weights) != {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}:
            raise ValueError(
                f"image_projection has the keys {sorted(weights)}: only one linear layer and a "
                "norm can be computed here, use diffusers' load_ip_adapter for others"
            )
        flat = F.linear(embeds, weights["proj.weight"], weights["proj.bias"])
        tokens = flat.unflatten(-1, (self.num_tokens, -1))
        norm = weights["norm.weight"], weights["norm.bias"]
        return F.layer_norm(tokens, tokens.shape[-1:], *norm)


def read_ip_adapter(file: Source, model: nn.Module) -> IPAdapterFile:
    """Reads an image prompt.

    Args:
        file: A file of safetensors or `torch.save`, or its state dict, nested or flat.
        model: The model that it is for.

    Returns:
        The weights by the model's layers.

    Raises:
        ValueError: Keys are unknown, missing or of the wrong shape; all of them are listed.
    """
    problems = Problems("IP-Adapter")
    flat = _flat(opened(file)[0])
    image, given = _under("image_proj.", flat), _under("ip_adapter.", flat)
    for key in flat:
        if not key.startswith(("image_proj.", "ip_adapter.")):
            problems.add(key, "is unknown")

    layout = _layout(given)
    numbers = dict(numbered(model, layout))
    layers, lora = _sorted(given, layout, numbers, model, problems)
    _check(layers, layout, model, problems)
    tokens = _num_tokens(image, problems)
    problems.check()
    return IPAdapterFile(layout, {p: dict(t) for p, t in layers.items()}, image, tokens, lora)


def numbered(model: nn.Module, layout: Layout) -> Iterator[tuple[int, str]]:
    """The layers that have an image prompt, with their numbers in the files."""
    paths = _counted(model)
    attns = {path: model.get_submodule(path) for path in paths}
    if layout == "sd3":
        yield from enumerate(paths)
    elif layout == "flux":
        joint = [p for p, a in attns.items() if getattr(a, "add_k_proj", None) is not None]
        yield from enumerate(joint)
    else:
        cross = [path for path, attn in attns.items() if _is_cross(path, attn)]
        # In a U-Net self attention has the even numbers, with no image prompt.
        yield from ((2 * i + 1, path) for i, path in enumerate(cross))


def _counted(model: nn.Module) -> list[str]:
    """The attention modules that have a number: none of a video's, none that project images."""
    paths = (path for path, _ in processors(model))
    return [path for path in paths if not _UNCOUNTED.match(path)]


def _is_cross(path: str, attn: nn.Module) -> bool:
    return bool(getattr(attn, "is_cross_attention", path.endswith("attn2")))


def _flat(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under the names of the flat form."""
    flat: dict[str, Tensor] = {}
    for key, value in tensors.items():
        nested = value if isinstance(value, Mapping) else {None: value}
        for inner, tensor in nested.items():
            name = key if inner is None else f"{key}.{inner}"
            for theirs, ours in _XLABS.items():
                name = name.replace(theirs, ours)
            flat[name] = tensor
    return flat


def _under(prefix: str, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


def _layout(given: Mapping[str, Tensor]) -> Layout:
    if any(".norm_ip." in key for key in given):
        return "sd3"
    return "flux" if any(key.endswith("_ip.bias") for key in given) else "unet"


def _sorted(
    given: Mapping[str, Tensor],
    layout: Layout,
    numbers: Mapping[int, str],
    model: nn.Module,
    problems: Problems,
) -> tuple[dict[str, dict[str, Tensor]], LoRAFile | None]:
    """The tensors of each layer, in order, and the low-rank updates among them."""
    found: dict[str, dict[str, Tensor]] = {path: {} for path in numbers.values()}
    updates: dict[str, dict[str, dict[str, Tensor]]] = {}
    paths = _counted(model)
    for key, tensor in given.items():
        number, _, name = key.partition(".")
        index = int(number) if number.isdecimal() else -1
        match = _LORA.fullmatch(name)
        if index in numbers and name in _KEYS[layout]:
            found[numbers[index]][name] = tensor
        elif match and 0 <= index < len(paths):
            pair = updates.setdefault(paths[index], {}).setdefault(match[1], {})
            pair[match[2]] = tensor
        else:
            problems.add(f"ip_adapter.{key}", f"is unknown, {len(numbers)} layers take a prompt")
    for number, path in numbers.items():
        for name in _KEYS[layout]:
            if name not in found[path]:
                problems.add(f"ip_adapter.{number}.{name}", f"is missing, it is for {path}")
    return found, _lora(updates, model, problems)


def _lora(
    updates: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    model: nn.Module,
    problems: Problems,
) -> LoRAFile | None:
    layers: dict[str, dict[str, LoRAWeights]] = {}
    for path, projections in updates.items():
        sizes = widths(model.get_submodule(path))
        for projection, pair in projections.items():
            name = f"{path}.{projection}_lora"
            for part in {"down", "up"} - pair.keys():
                problems.add(name, f"its {part} matrix is missing")
            if len(pair) == 2:
                wide, out = sizes[projection]
                problems.shape(f"{name}.down", pair["down"], (None, wide))
                problems.shape(f"{name}.up", pair["up"], (out, len(pair["down"])))
                weights = LoRAWeights(pair["down"], pair["up"])
                layers.setdefault(path, {})[projection] = weights
    return LoRAFile(layers, layout="ip_adapter") if layers else None


def _check(
    layers: Mapping[str, Mapping[str, Tensor]],
    layout: Layout,
    model: nn.Module,
    problems: Problems,
) -> None:
    """Compares the tensors with what each layer takes; the prompts' width is one for all."""
    wide = temb = None
    for path, tensors in layers.items():
        attn = model.get_submodule(path)
        (text, hidden) = widths(attn)["to_k"]
        key = tensors.get("to_k_ip.weight")
        wide = text if layout == "unet" else wide or (None if key is None else key.shape[-1])
        norm = tensors.get("norm_ip.linear.weight")
        temb = temb or (None if norm is None else norm.shape[-1])
        twice = None if wide is None else 2 * wide
        needs: dict[str, tuple[int | None, ...]] = {
            "norm_ip.linear.weight": (twice, temb),
            "norm_ip.linear.bias": (twice,),
            **dict.fromkeys(_KV, (hidden, wide)),
            **dict.fromkeys(("to_k_ip.bias", "to_v_ip.bias"), (hidden,)),
        }
        for name, tensor in tensors.items():
            need = needs.get(name, (hidden // cast(int, attn.heads),))
            problems.shape(f"{path}.{name}", tensor, need)


def _num_tokens(image: Mapping[str, Tensor], problems: Problems) -> int:
    """How many tokens an image projection makes of an image, by the kinds there are."""
    if "latents" in image:
        return image["latents"].shape[1]
    if "proj.3.weight" in image:
        # One for each patch of the image encoder and one for the whole.
        return 257
    if "perceiver_resampler.proj_in.weight" in image:
        return 4
    linear = next((k for k in ("proj.weight", "proj.2.weight") if k in image), None)
    if linear and "norm.weight" in image:
        return image[linear].shape[0] // image["norm.weight"].shape[0]
    problems.add("image_proj", f"is of no known kind, it has {sorted(image) or 'no keys'}")
    return 0
