"""The floor of a call: what no extra pass over memory and no launch gap would cost.

It is the sum of the linear layers that diffusers' call runs and of the fastest of torch's fused
attention kernels at its shapes without a mask, each timed alone as a replayed graph. A call
without softmax attention has one read and one write of queries, keys and values in its place.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from measure import Times, by_turns, graphed
from sides import Pair
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["Attention", "Conv", "Copy", "Linear", "calls", "floor", "record"]

_BACKENDS = {
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}
# So many in one graph show an operator's time without the gap between two graphs.
_COPIES = 10


@dataclass(frozen=True)
class Linear:
    """A linear layer that was run: ``[rows, width] -> [rows, out]``."""

    rows: int
    width: int
    out: int
    bias: bool
    kind = "linear"

    def __str__(self) -> str:
        return f"{self.rows} x {self.width} -> {self.out}{' + bias' if self.bias else ''}"


@dataclass(frozen=True)
class Conv:
    """A convolution that was run; it is told beside the floor, not in it."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    options: tuple[Any, ...]
    kind = "conv"

    def __str__(self) -> str:
        return f"{_times(self.x)} by {_times(self.weight)}"


@dataclass(frozen=True)
class Attention:
    """Softmax attention that was run: queries ``[B, H, Q, D]``, keys ``[B, H', K, D]``."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    kind = "attention"

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.batch} x {heads} heads x {self.queries} x {self.keys} x {self.dim}"


@dataclass(frozen=True)
class Copy:
    """One read and one write of so many elements."""

    elements: int
    kind = "copy"

    def __str__(self) -> str:
        return f"{self.elements} elements"


Work = Linear | Conv | Attention | Copy


@dataclass
class Recorded:
    """How often which work was run, under which names of weights."""

    counts: dict[Work, int] = field(default_factory=dict)
    names: dict[Work, list[str]] = field(default_factory=dict)

    def add(self, work: Work, name: str = "") -> None:
        """Counts one."""
        self.counts[work] = self.counts.get(work, 0) + 1
        if name:
            self.names.setdefault(work, []).append(name)

    def of(self, kind: type) -> list[Work]:
        """What there is of a kind."""
        return [work for work in self.counts if isinstance(work, kind)]


class _Recorder(TorchFunctionMode):
    """Sees the calls of linear layers, convolutions and attention."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.found = names, Recorded()
        # Eager attention multiplies a batch of heads at a time, sliced attention a few of them.
        self.scores: dict[tuple[int, int, int], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen = self._SEEN.get(func)
        if seen is not None:
            seen(self, *args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        rows = input.numel() // input.shape[-1]
        work = Linear(rows, weight.shape[1], weight.shape[0], bias is not None)
        self.found.add(work, self.names.get(id(weight), ""))

    def _conv(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any
    ) -> None:
        plain = tuple(tuple(o) if isinstance(o, list) else o for o in options)
        work = Conv(tuple(input.shape), tuple(weight.shape), plain)
        self.found.add(work, self.names.get(id(weight), ""))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> None:
        (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
        self.found.add(Attention(batch, heads, kv_heads, queries, keys, dim))

    def _product(self, input: Tensor, batch1: Tensor, batch2: Tensor, **_: Any) -> None:
        size = (batch1.shape[1], batch2.shape[2], batch1.shape[2])
        self.scores[size] = self.scores.get(size, 0) + batch1.shape[0]

    _SEEN: Mapping[Any, Callable[..., None]] = {
        F.linear: _linear,
        F.conv2d: _conv,
        F.scaled_dot_product_attention: _attention,
        torch.baddbmm: _product,
    }


@torch.no_grad()
def record(pair: Pair) -> Recorded:
    """What diffusers' call of a row runs."""
    names = {id(p): name for name, p in pair.attn.named_parameters()}
    theirs = pair.processors["diffusers"]
    if isinstance(theirs, nn.Module):
        names |= {id(p): name for name, p in theirs.named_parameters()}
    with _Recorder(names) as recorder:
        pair.call("diffusers")()
    found = recorder.found
    batch = pair.inputs["hidden_states"].shape[0]
    for (queries, keys, dim), total in recorder.scores.items():
        heads = total // batch
        found.add(Attention(batch, heads, heads, queries, keys, dim))
    if not found.of(Attention):
        found.add(Copy(_qkv_elements(pair, found)))
    return found


def _qkv_elements(pair: Pair, found: Recorded) -> int:
    """Elements of queries, keys and values; of every scale, where there are several."""
    scales = 1 + len(getattr(pair.attn, "to_qkv_multiscale", ()))
    elements = 0
    for work, names in found.names.items():
        if isinstance(work, Linear):
            elements += work.rows * work.out * sum("to_out" not in name for name in names)
    return elements * scales


def floor(pair: Pair, seconds: float) -> dict[str, Any]:
    """The floor of a row and its parts, in ms.

    Args:
        pair: The row.
        seconds: Time of one measurement.

    Returns:
        `ms`, the sum by the definition; `tight_ms`, the same of ten in one graph, so without the
        gaps between graphs; `conv_ms`, convolutions, which neither counts; `parts`, each with its
        share of `ms`.
    """
    found = record(pair)
    parts: list[dict[str, Any]] = []
    for work, count in found.counts.items():
        timed = _timed(work, pair, seconds / 4)
        part = {"kind": work.kind, "what": str(work), "count": count, **timed}
        parts.append(part | {"names": found.names.get(work, [])})

    def total(key: str, *kinds: str) -> float:
        return round(sum(p[key] * p["count"] for p in parts if p["kind"] in kinds), 5)

    counted = ("linear", "attention", "copy")
    sums = {f"{kind}_ms": total("ms", kind) for kind in (*counted, "conv")}
    both = {"ms": total("ms", *counted), "tight_ms": total("tight_ms", *counted)}
    return {**both, **sums, "parts": parts}


@torch.no_grad()
def calls(pair: Pair) -> Callable[[], list[Any]]:
    """What the floor is made of, one call after the other, attention as torch chooses.

    By turns with both sides it tells what they would take if nothing but this were in them.
    """
    generator = torch.Generator(pair.device).manual_seed(0)
    parts: list[Callable[[], Any]] = []
    for work, count in record(pair).counts.items():
        if not isinstance(work, Conv):
            # Each of tensors of its own: the compiler would compute alike ones once.
            parts += [_call(work, _Random(pair, generator)) for _ in range(count)]

    def run() -> list[Any]:
        return [part() for part in parts]

    return run


@torch.no_grad()
def _timed(work: Work, pair: Pair, seconds: float) -> dict[str, Any]:
    candidates = _candidates(work, pair)
    found: dict[str, tuple[float, float]] = {}
    for name, call in candidates.items():
        # A kernel that does not take these shapes warns why, then raises.
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore")
            found[name] = _both(call, pair.device, seconds)
    if not found:
        raise RuntimeError(f"no kernel of {', '.join(candidates)} takes {work}")
    name, (alone, tight) = min(found.items(), key=lambda item: item[1][0])
    return {"ms": round(alone, 5), "tight_ms": round(tight, 5), "kernel": name}


def _both(call: Callable[[], Any], device: str, seconds: float) -> tuple[float, float]:
    """Time of one alone, and of one among ten."""
    call()
    if device == "cpu":
        return (_median(call, device, seconds),) * 2
    alone = _median(graphed(call), device, seconds)
    return alone, _median(graphed(call, _COPIES), device, seconds) / _COPIES


def _median(call: Callable[[], Any], device: str, seconds: float) -> float:
    times: dict[str, Times] = by_turns({"": call}, device, seconds)
    return times[""].median


@dataclass(frozen=True)
class _Random:
    """Makes tensors of a row's device and dtype."""

    pair: Pair
    generator: torch.Generator

    def __call__(self, *shape: int) -> Tensor:
        made = torch.empty(shape, device=self.pair.device, dtype=self.pair.dtype)
        return made.normal_(generator=self.generator)


def _candidates(work: Work, pair: Pair) -> dict[str, Callable[[], Any]]:
    """What can do a work, by name."""
    call = _call(work, _Random(pair, torch.Generator(pair.device).manual_seed(0)))
    if not isinstance(work, Attention):
        return {work.kind: call}

    def by(backend: SDPBackend) -> Callable[[], Any]:
        def pinned() -> Tensor:
            with sdpa_kernel(backend):
                return call()

        return pinned

    return {name: by(backend) for name, backend in _BACKENDS[pair.device].items()}


def _call(work: Work, random: _Random) -> Callable[[], Any]:
    """Does a work; which kernel does attention is left to torch."""
    if isinstance(work, Linear):
        x, weight = random(work.rows, work.width), random(work.out, work.width)
        bias = random(work.out) if work.bias else None
        return lambda: F.linear(x, weight, bias)
    if isinstance(work, Conv):
        x, weight = random(*work.x), random(*work.weight)
        return lambda: F.conv2d(x, weight, None, *work.options)
    if isinstance(work, Copy):
        x = random(work.elements)
        # A bound method of torch's is nothing that the compiler traces.
        return lambda: x.clone()
    # Heads lie as the projections leave them, so that the output needs no copy either.
    q = random(work.batch, work.queries, work.heads, work.dim).transpose(1, 2)
    k, v = (random(work.batch, work.keys, work.kv_heads, work.dim).transpose(1, 2) for _ in "kv")
    fewer = work.heads != work.kv_heads
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=fewer)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if math.prod(shape) else "nothing"
