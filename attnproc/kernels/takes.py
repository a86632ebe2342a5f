"""What a kernel takes, and why it would not take a call."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tracing import constant
from ..types import Bias, Keys, Scoring

__all__ = [
    "ANYTHING",
    "HALF",
    "KINDS",
    "Ask",
    "Takes",
    "ask",
    "kinds",
    "missing",
    "why_not",
]

KINDS = frozenset({"keys", "dense", "bias", "learned", "causal", "window", "blocks"})
"""Keys: bool over keys. Dense: bool a query. Bias: added; learned, if it needs a gradient."""
HALF = (torch.float16, torch.bfloat16)


class Ask(NamedTuple):
    """One kind of call, as plain values: what the choice of a kernel depends on."""

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    v_dim: int
    kinds: frozenset[str]
    backward: bool
    lse: bool
    dropout: bool
    compiling: bool
    window: tuple[int | None, int | None] | None = None
    mods: tuple[str, ...] = ()
    """The names of what masks by functions of positions."""

    @property
    def ragged(self) -> bool:
        """Whether positions matter while queries and keys differ in number."""
        return self.queries != self.keys and bool(self.kinds & {"causal", "window"})


@dataclass(frozen=True)
class Takes:
    """What a kernel takes.

    Args:
        devices: Types of devices; None is any.
        dtypes: None is any floating dtype.
        dims: Channels a head: least, most and what they are a multiple of.
        any_v: Values of another width than queries and keys.
        masks: Kinds of masks, of `KINDS`.
        gqa: Fewer key than query heads.
        dropout: Dropout of the weights.
        scale: A factor other than ``D ** -0.5``.
        backward: Whether it has gradients.
        lse: Whether it gives the log-sum-exp of the scores.
        deterministic: Whether gradients come out the same every time.
        traceable: Whether `torch.compile` keeps it in its graph.
        exact: False for kernels that quantise.
        needs: The module that it imports.
        install: How to get that.
        also: A further condition: the reason why not, or None.
    """

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    dims: tuple[int, int, int] = (1, 1 << 16, 1)
    any_v: bool = True
    masks: frozenset[str] = KINDS
    gqa: bool = True
    dropout: bool = False
    scale: bool = True
    backward: bool = True
    lse: bool = False
    deterministic: bool = True
    traceable: bool = True
    exact: bool = True
    needs: str = ""
    install: str = ""
    also: Callable[[Ask], str | None] | None = None


def ask(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, lse: bool = False) -> Ask:
    """What kind of call this is; q ``[B, H, Q, D]``, k and v ``[B, H', K, D]``."""
    found, scale = kinds(scoring), scoring.scale
    grad = torch.is_grad_enabled()
    learned = "learned" in found or (isinstance(scale, Tensor) and scale.requires_grad)
    return Ask(
        device=q.device.type,
        dtype=q.dtype,
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        queries=q.shape[2],
        keys=k.shape[2],
        dim=q.shape[3],
        v_dim=v.shape[3],
        kinds=found,
        backward=grad and (q.requires_grad or k.requires_grad or v.requires_grad or learned),
        lse=lse,
        dropout=scoring.dropout > 0,
        compiling=torch.compiler.is_compiling(),
        window=scoring.window,
        mods=tuple(_name_of(mod) for mod in scoring.mods),
    )


def _name_of(mod: Any) -> str:
    """What a function of positions is called: by its type, where it is an object with settings."""
    return mod.__name__ if isinstance(mod, FunctionType) else type(mod).__name__


_NONE: frozenset[str] = frozenset()


def kinds(scoring: Scoring) -> frozenset[str]:
    """Which kinds of masks hold."""
    mask, found = scoring.mask, _NONE
    if isinstance(mask, Keys):
        found = frozenset({"keys"})
    elif isinstance(mask, Bias):
        found = frozenset({_kind_of(mask.values)})
    if scoring.causal:
        found = found | {"causal"}
    if scoring.window is not None:
        found = found | {"window"}
    return found | {"blocks"} if scoring.mods else found


def _kind_of(values: Tensor) -> str:
    if values.dtype == torch.bool:
        return "dense"
    return "learned" if values.requires_grad and torch.is_grad_enabled() else "bias"


def why_not(takes: Takes, asked: Ask) -> list[str]:
    """The reasons why a kernel does not take a call; none if it does."""
    least, most, multiple = takes.dims
    refused = asked.kinds - takes.masks
    taken = ", ".join(sorted(takes.masks)) or "none"
    found = [missing(takes.needs, takes.install)] if takes.needs else []
    checks = (
        (takes.devices is None or asked.device in takes.devices,
         f"device {asked.device}: it runs on {', '.join(takes.devices or ())}"),
        (takes.dtypes is None or asked.dtype in takes.dtypes,
         f"dtype {_short(asked.dtype)}: it takes {', '.join(map(_short, takes.dtypes or ()))}"),
        (least <= asked.dim <= most and asked.dim % multiple == 0,
         f"{asked.dim} channels a head: it takes {least} to {most} in steps of {multiple}"),
        (takes.any_v or asked.v_dim == asked.dim,
         f"{asked.v_dim} channels a head in values, {asked.dim} in keys: it takes as many"),
        (not refused,
         f"mask {' & '.join(sorted(refused))}: it takes {taken}"),
        (takes.gqa or asked.heads == asked.kv_heads,
         f"{asked.kv_heads} key heads for {asked.heads} query heads: it takes as many"),
        (takes.dropout or not asked.dropout, "dropout: it has none"),
        (takes.backward or not asked.backward, "gradients: it has no backward"),
        (takes.lse or not asked.lse, "return_lse: it gives none"),
        (takes.traceable or not asked.compiling, "torch.compile: it can't be traced"),
    )  # fmt: skip
    found += [reason for holds, reason in checks if not holds]
    if takes.also is not None:
        found.append(takes.also(asked))
    return [reason for reason in found if reason]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@constant
def missing(module: str, install: str) -> str | None:
    """Why a module can't be imported, without importing it; None if it seems to be there."""
    if module in sys.modules or _is_found(module):
        return None
    return f"{module.partition('.')[0]} is not installed: {install}"


@functools.cache
def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


ANYTHING = Takes()
