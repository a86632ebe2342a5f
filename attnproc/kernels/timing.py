"""Times the kernels at the calls that a model makes here, and keeps what is fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..types import Bias, KernelCall, Keys, Mask, MaskMod, Scoring
from .base import Kernel, registered
from .chunked import CHUNKED
from .guard import error_of
from .plan import AUTO, forget
from .scope import within
from .takes import Ask, ask, why_not
from .tuned import device_name, key_of, store

__all__ = ["Timing", "Tuned", "autotune", "calls_of", "measure", "untimed"]


@dataclass(frozen=True)
class Timing:
    """What a kernel makes of one kind of call.

    Attributes:
        name: The kernel's.
        ms: Median time of a call, with its backward pass where the model has one.
        error: Root mean square error relative to the exact output.
        failed: Why it has no time.
    """

    name: str
    ms: float = float("inf")
    error: float = 0.0
    failed: str = ""


@dataclass(frozen=True)
class Tuned:
    """The outcome for one kind of call.

    Attributes:
        asked: The kind of call.
        best: The kernel that the automatic choice takes from now on.
        timings: All of them, the fastest first.
    """

    asked: Ask
    best: str
    timings: tuple[Timing, ...]


@dataclass(eq=False)
class Recorder:
    """Stands where a guard stands, and notes the kinds of calls."""

    found: dict[Ask, int] = field(default_factory=dict)
    mods: dict[Ask, tuple[MaskMod, ...]] = field(default_factory=dict)
    """What masks a kind of call by functions of positions: an example."""

    def run(
        self, kernel: KernelCall, exact: KernelCall, *inputs: Tensor, scoring: Scoring
    ) -> Tensor:
        q, k, v = inputs
        kind = ask(q, k, v, scoring)
        self.found[kind] = self.found.get(kind, 0) + 1
        self.mods[kind] = scoring.mods
        return exact(q, k, v, scoring)


def autotune(
    calls: Callable[[], Any] | Iterable[Ask],
    *,
    max_error: float | None = None,
    seconds: float = 0.2,
    path: str | Path | None = None,
) -> list[Tuned]:
    """Times every kernel that takes a call, for each kind of call that a model makes.

    Args:
        calls: A function that runs the model once, such as ``lambda: pipe(prompt)``; or the kinds
            of calls themselves.
        max_error: Quantised kernels may be chosen if their error, relative to the root mean
            square of the exact output, is at most this; None leaves them out.
        seconds: How long each kernel is timed for.
        path: The file of the table; None is the usual one.

    Returns:
        One outcome a kind of call; the table has them from now on.

    Raises:
        ValueError: A kind of call does not say what masks it.
    """
    if callable(calls):
        recorder = _recorded(calls)
        asks, mods = list(recorder.found), recorder.mods
    else:
        asks, mods = list(calls), {}
    outcomes = [measure(a, max_error, seconds, mods.get(a, ())) for a in asks]
    for device in {outcome.asked.device for outcome in outcomes}:
        found = {key_of(o.asked): o.best for o in outcomes if o.asked.device == device}
        store(found, device_name(device), path)
    forget()
    return outcomes


def calls_of(run: Callable[[], Any]) -> dict[Ask, int]:
    """The kinds of attention calls that `run` makes, and how often; layers that name a kernel of
    their own make none.
    """
    return _recorded(run).found


def _recorded(run: Callable[[], Any]) -> Recorder:
    recorder = Recorder()
    with within("auto", recorder):
        run()
    return recorder


def measure(
    asked: Ask,
    max_error: float | None = None,
    seconds: float = 0.2,
    mods: tuple[MaskMod, ...] = (),
) -> Tuned:
    """Times the kernels at one kind of call, on made-up inputs under the masks of that kind.

    Raises:
        ValueError: What masks the call is not known.
    """
    if reason := untimed(asked, mods):
        raise ValueError(reason)
    q, k, v = _inputs(asked)
    causal = "causal" in asked.kinds
    scoring = Scoring(mask=_mask(asked), causal=causal, window=asked.window, mods=mods)
    with torch.no_grad():
        right = CHUNKED(q.float(), k.float(), v.float(), scoring)
    kernels = [
        kernel
        for kernel in registered().values()
        if kernel != AUTO
        and (kernel.takes.exact or max_error is not None)
        and not why_not(kernel.takes, asked)
    ]
    timings = [_timed(kernel, (q, k, v), scoring, right, asked, seconds) for kernel in kernels]
    timings.sort(key=lambda timing: timing.ms)
    return Tuned(asked, _best(timings, max_error), tuple(timings))


def untimed(asked: Ask, mods: tuple[MaskMod, ...] = ()) -> str | None:
    """Why a kind of call can't be timed: masks by position can't be made up."""
    if "window" in asked.kinds and asked.window is None:
        return "a call under a window is timed by the window's size, which is not given"
    if "blocks" in asked.kinds and not mods:
        return "a call under blocks is timed by its mask: give autotune a function that runs it"
    return None


def _best(timings: Sequence[Timing], max_error: float | None) -> str:
    exact = {kernel.name for kernel in registered().values() if kernel.takes.exact}
    for timing in timings:
        allowed = 0.05 if timing.name in exact or max_error is None else max_error
        if not timing.failed and timing.error <= allowed:
            return timing.name
    return CHUNKED.name


def _timed(
    kernel: Kernel,
    inputs: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
    right: Tensor,
    asked: Ask,
    seconds: float,
) -> Timing:
    def call() -> None:
        o = kernel(*inputs, scoring)
        if asked.backward:
            torch.autograd.grad(o, inputs, o)

    try:
        with torch.no_grad():
            error = error_of(kernel(*inputs, scoring), right)
        # On first use: importing it takes a third of a second.
        from torch.utils.benchmark import Timer

        median = (
            Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=seconds).median
        )
    except (RuntimeError, ImportError, NotImplementedError) as problem:
        return Timing(kernel.name, failed=str(problem).splitlines()[0])
    return Timing(kernel.name, median * 1e3, error)


def _inputs(asked: Ask) -> tuple[Tensor, Tensor, Tensor]:
    def made(heads: int, length: int, dim: int) -> Tensor:
        shape = (asked.batch, heads, length, dim)
        t = torch.randn(shape, device=asked.device, dtype=asked.dtype)
        return t.requires_grad_(asked.backward)

    return (
        made(asked.heads, asked.queries, asked.dim),
        made(asked.kv_heads, asked.keys, asked.dim),
        made(asked.kv_heads, asked.keys, asked.v_dim),
    )


def _mask(asked: Ask) -> Mask | None:
    size = (asked.queries, asked.keys)
    if "keys" in asked.kinds:
        lengths = torch.linspace(asked.keys / 2, asked.keys, asked.batch, device=asked.device)
        return Keys.first(lengths.long(), asked.keys)
    if "dense" in asked.kinds:
        return Bias(torch.rand(1, 1, *size, device=asked.device) > 0.5)
    if asked.kinds & {"bias", "learned"}:
        bias = torch.randn(1, 1, *size, device=asked.device, dtype=asked.dtype)
        return Bias(bias.requires_grad_("learned" in asked.kinds))
    return None
