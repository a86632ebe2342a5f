"""Custom Diffusion's projections as diffusers' `save_attn_procs` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..interop import processors
from ..linears import widths
from .files import Problems, Source, opened

__all__ = ["CustomDiffusionFile", "read_custom_diffusion"]

_KV = ("to_k_custom_diffusion.weight", "to_v_custom_diffusion.weight")
_OUT = "to_out_custom_diffusion.0."
_Q_OUT = ("to_q_custom_diffusion.weight", f"{_OUT}weight")


@dataclass(frozen=True)
class CustomDiffusionFile:
    """What a Custom Diffusion file holds for a model.

    Attributes:
        layers: The tensors by the attention module's path, under the processor's own keys.
    """

    layers: dict[str, dict[str, Tensor]]


def read_custom_diffusion(file: Source, model: nn.Module) -> CustomDiffusionFile:
    """Reads projections of Custom Diffusion.

    Args:
        file: A file or directory (see `attnproc.weights.files.opened`) or a state dict.
        model: The model that it is for.

    Raises:
        ValueError: Keys are unknown, missing or of the wrong shape; all of them are listed.
    """
    problems = Problems("Custom Diffusion")
    attns = dict(processors(model))
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in opened(file)[0].items():
        name = key.removeprefix("unet.")
        path, _, rest = name.replace(".processor.", "\n").rpartition("\n")
        if not isinstance(tensor, Tensor):
            # A layer without projections of its own; files of `torch.save` list them too.
            continue
        if path not in attns or rest not in (*_KV, *_Q_OUT, f"{_OUT}bias"):
            problems.add(key, "is unknown")
        else:
            layers.setdefault(path, {})[rest] = tensor
    if not layers and not problems.found:
        problems.add("no key", "is a projection of Custom Diffusion")
    for path, tensors in layers.items():
        _check(path, tensors, attns[path], problems)
    problems.check()
    return CustomDiffusionFile(layers)


def _check(path: str, tensors: Mapping[str, Tensor], attn: nn.Module, problems: Problems) -> None:
    has_q_out = any(name not in _KV for name in tensors)
    need = _KV + _Q_OUT if has_q_out else _KV
    for name in need:
        if name not in tensors:
            problems.add(f"{path}.{name}", "is missing")
    sizes = widths(attn)
    for name, tensor in tensors.items():
        wide, out = sizes[name.partition("_custom")[0]]
        problems.shape(f"{path}.{name}", tensor, (out,) if name.endswith("bias") else (out, wide))
