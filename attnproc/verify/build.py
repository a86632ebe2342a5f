"""Modules, processors and inputs of a case, on either side of the comparison."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnproc.interop import put
from attnproc.verify.references import reference
from attnproc.verify.specs import Case, ModuleSpec, draw, fill, weight

__all__ = ["Result", "Setting", "build", "diffusers_found", "evaluate", "flat"]

Side = Literal["ours", "theirs"]


@dataclass(frozen=True)
class Result:
    """What a call gave: outputs in order, and gradients by the name of what they are for."""

    outputs: tuple[Tensor, ...]
    grads: Mapping[str, Tensor]


@dataclass
class Setting:
    """A case made ready: the module, the processor on it, and the call's keywords."""

    case: Case
    attn: nn.Module
    processor: Callable[..., Any]
    inputs: dict[str, Any]

    def call(self, direct: bool = True) -> tuple[Tensor, ...]:
        """Run the processor, or the module that carries it; the outputs as a tuple."""
        torch.manual_seed(0)
        out = self.processor(self.attn, **self.inputs) if direct else self.attn(**self.inputs)
        return out if isinstance(out, tuple) else (out,)


def diffusers_found() -> bool:
    """Whether diffusers can be imported."""
    return importlib.util.find_spec("diffusers") is not None


def build(
    case: Case,
    side: Side,
    dtype: torch.dtype,
    *,
    rounded: torch.dtype | None = None,
    own_modules: bool = False,
) -> Setting:
    """The case with `side`'s processor.

    Args:
        case: the configuration.
        side: our class, or the reference (diffusers' class, naive LoRA over diffusers' base).
        dtype: of weights and inputs.
        rounded: a coarser dtype that weights and inputs are rounded to before.
        own_modules: our attention modules, in place of diffusers'.

    Returns:
        The setting, on the CPU.
    """
    rounded = rounded or dtype
    attn = _module(case.module, own_modules).double()
    _load(case.id, "attn", attn)
    for step in case.setup:
        _STEPS[step](attn)
    if side == "ours":
        processor = getattr(importlib.import_module("attnproc"), case.cls)(**case.init)
    else:
        processor = reference(case.cls, case.init)
    if isinstance(processor, nn.Module):
        _load(case.id, "processor", processor.double())
        processor.train(attn.training).to(rounded).to(dtype)
    attn.to(rounded).to(dtype)
    _mount(attn, processor)
    return Setting(case, attn, processor, fill(case, dtype, rounded))


def evaluate(setting: Setting, outputs: tuple[Tensor, ...], grads: bool = True) -> Result:
    """The outputs of `setting`, with the gradients of a fixed random projection of them.

    Args:
        setting: what was called.
        outputs: what came out.
        grads: whether to take gradients.

    Returns:
        Outputs and gradients; a leaf that has none gets zeros.
    """
    found = tuple(out.detach() for out in outputs)
    if not grads:
        return Result(found, {})
    loss = torch.stack(
        [
            (out.double() * draw(setting.case.id, f"loss.{i}", tuple(out.shape))).sum()
            for i, out in enumerate(outputs)
        ]
    ).sum()
    leaves = _leaves(setting)
    values: list[Any] = list(torch.autograd.grad(loss, [*leaves.values()], allow_unused=True))
    pairs = zip(leaves.items(), values, strict=True)
    return Result(found, {n: torch.zeros_like(t) if g is None else g for (n, t), g in pairs})


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in nested lists, tuples and dicts, by path."""
    if isinstance(value, Tensor):
        return {name: value}
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return {k: t for key, item in items for k, t in flat(item, f"{name}.{key}").items()}


def _leaves(setting: Setting) -> dict[str, Tensor]:
    leaves = {n: t for n, t in flat(setting.inputs, "inputs").items() if t.requires_grad}
    for prefix, holder in {"processor": setting.processor, "attn": setting.attn}.items():
        if isinstance(holder, nn.Module):
            named = holder.named_parameters()
            leaves |= {f"{prefix}.{name}": tensor for name, tensor in named}
    return {n: t for n, t in leaves.items() if not n.startswith("attn.processor.")}


def _mount(attn: nn.Module, processor: Any) -> None:
    setter: Callable[[Any], None] | None = getattr(attn, "set_processor", None)
    if setter is not None:
        setter(processor)
        return
    put(attn, processor)


@torch.no_grad()
def _load(case: str, prefix: str, module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(weight(case, f"{prefix}.{name}", tuple(tensor.shape)))


def _fuse(attn: nn.Module) -> None:
    attn.fuse_projections()  # pyright: ignore[reportCallIssue]


def _bare_out(attn: nn.Module) -> None:
    attn.to_out = nn.Identity()


_STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "fuse": _fuse,
    "train": nn.Module.train,
    "bare_out": _bare_out,
}


def _module(spec: ModuleSpec, own: bool) -> nn.Module:
    kwargs = dict(spec.kwargs)
    if spec.kind == "mochi":
        kwargs["processor"] = None
    if own:
        made = _own(spec.kind, kwargs)
    else:
        home, name = _DIFFUSERS[spec.kind]
        made = getattr(importlib.import_module(f"diffusers.models.{home}"), name)(**kwargs)
    return made.eval()


def _own(kind: str, kwargs: dict[str, Any]) -> nn.Module:
    if kind == "flux":
        # The same keys: Flux norms q and k always, and has both outputs whenever it has text.
        kwargs |= {"qk_norm": "rms_norm"}
    name = {"mochi": "MochiAttention", "multiscale": "SanaMultiscaleLinearAttention"}
    module = getattr(importlib.import_module("attnproc"), name.get(kind, "Attention"))
    return module(**kwargs)


_DIFFUSERS = {
    "attention": ("attention_processor", "Attention"),
    "flux": ("transformers.transformer_flux", "FluxAttention"),
    "mochi": ("attention_processor", "MochiAttention"),
    "multiscale": ("attention_processor", "SanaMultiscaleLinearAttention"),
}
