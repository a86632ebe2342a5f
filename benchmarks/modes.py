"""What a benchmark measures of two sides that compute the same, a function a mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import compiled as compiling
import torch
from measure import RISE, Call, Times, by_turns, graphed, host, kernel_times, peak_mib
from sides import SIDES, difference

__all__ = ["COMMON", "Both", "Found", "Mode", "Options", "gated", "reason"]

Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What a run measures by.

    Attributes:
        device: "cpu" or "cuda".
        dtype: Of weights and inputs.
        shrink: Divides the tokens.
        modes: What is measured.
        seconds: Time of one measurement.
        compile_limit: Seconds that compiling may take.
    """

    device: str
    dtype: torch.dtype
    shrink: int
    modes: tuple[str, ...]
    seconds: float
    compile_limit: float


class Both(Protocol):
    """Something to be timed, with two sides."""

    @property
    def beside(self) -> Mapping[str, Call]:
        """Other calls that are timed by turns with both sides, by name."""
        ...

    def call(self, side: str) -> Callable[[], Any]:
        """A forward pass of that side."""
        ...

    def agree(self) -> float:
        """The difference of the outputs; raises where it is too large."""
        ...


Mode = Callable[[Any, Options], Found]


@torch.no_grad()
def gated(
    make: Callable[[], Both], modes: Iterable[tuple[str, Mode]], options: Options
) -> dict[str, Any]:
    """The gate, then the modes; what fails says why and does not end the run."""
    found: dict[str, Any] = {}
    try:
        both = make()
        found["difference"] = both.agree()
    except Exception as problem:
        return {"failed": reason(problem)}
    for name, mode in modes:
        try:
            more = mode(both, options)
        except Exception as problem:
            more = {"failures": {name: reason(problem)}}
        for key, value in more.items():
            found.setdefault(key, {}).update(value)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return found


def eager(both: Both, options: Options) -> Found:
    calls = _calls(both)
    found = _times("eager", _by_turns(calls, options))
    if options.device == "cuda":
        more = _times("host", host(calls, options.device, options.seconds / 2))
        found = {side: found[side] | more[side] for side in calls}
    return found


def graph(both: Both, options: Options) -> Found:
    if options.device != "cuda":
        return {}
    calls, failures = _each(_calls(both), graphed, "graph")
    return _times("graph", _by_turns(calls, options)) | failures


def compiled(both: Both, options: Options) -> Found:
    facts, times, failures = _compiled(both, options, "compiled", None)
    return {side: facts.get(side, {}) | times[side] for side in times} | failures


def replayed(both: Both, options: Options) -> Found:
    if options.device != "cuda":
        return {}
    facts, times, failures = _compiled(both, options, "replayed", "reduce-overhead")
    right = "replayed_difference"
    for side, known in facts.items():
        times[side][right] = known[right]
    return times | failures


def _compiled(
    both: Both, options: Options, name: str, mode: str | None
) -> tuple[Found, Found, Found]:
    """What is known of both sides' compiled calls, their times, and what failed."""
    compiling.forget()
    made, failures = _each(
        _calls(both), lambda call: compiling.compiled(call, options.compile_limit, mode), name
    )
    right = _first(both.call("diffusers")())
    found: Found = {}
    for side in made.keys() & SIDES:
        found[side] = made[side].facts()
        found[side][f"{name}_difference"] = difference(_first(made[side].call()), right)
    del right
    calls = {side: one.call for side, one in made.items()}
    times = _times(name, _by_turns(calls, options))
    compiling.forget()
    return found, times, failures


def backward(both: Both, options: Options) -> Found:
    gate = {"gate": {"gradient_difference": both.gradients_agree()}}
    steps = {side: both.step(side) for side in SIDES}
    found = _times("backward", _by_turns(steps, options))
    failures: Found = {}
    if options.device == "cuda":
        calls, failures = _each(steps, graphed, "backward graph")
        more = _times("backward_graph", _by_turns(calls, options))
        found = {side: found[side] | more.get(side, {}) for side in SIDES}
    return gate | found | failures


def peak(both: Both, options: Options) -> Found:
    found: Found = {}
    for side in SIDES:
        found[side] = {"peak_mib": round(peak_mib(both.call(side), options.device), 2)}
        if "backward" in options.modes:
            mib = peak_mib(both.step(side), options.device)
            found[side]["backward_peak_mib"] = round(mib, 2)
    return found


def kernels(both: Both, options: Options) -> Found:
    if options.device != "cuda":
        return {}
    calls = _calls(both)
    found: Found = {side: {"kernels": kernel_times(call)} for side, call in calls.items()}
    if "compiled" not in options.modes:
        return found
    compiling.forget()
    made, failures = _each(
        calls, lambda call: compiling.compiled(call, options.compile_limit), "compiled kernels"
    )
    for side, one in made.items():
        found[side]["compiled_kernels"] = kernel_times(one.call)
    compiling.forget()
    return found | failures


# In this order whatever is asked: a call that can't be captured may leave the device unwell.
COMMON: dict[str, Mode] = {
    "eager": eager,
    "peak": peak,
    "backward": backward,
    "compiled": compiled,
    "replayed": replayed,
    "kernels": kernels,
    "graph": graph,
}


def _by_turns(calls: Mapping[str, Call], options: Options) -> dict[str, Times]:
    return by_turns(calls, options.device, 2 * options.seconds, RISE[options.device])


def _calls(both: Both) -> dict[str, Call]:
    """What is timed by turns."""
    return {side: both.call(side) for side in SIDES} | dict(both.beside)


def _each(
    calls: Mapping[str, Call], make: Callable[[Call], Any], mode: str
) -> tuple[dict[str, Any], Found]:
    """What `make` gives for each call, and why it gave none."""
    made: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for side, call in calls.items():
        try:
            made[side] = make(call)
        except Exception as problem:
            failures[f"{side} {mode}"] = reason(problem)
    return made, {"failures": failures} if failures else {}


def _times(mode: str, times: dict[str, Any]) -> Found:
    return {side: some.named(mode) for side, some in times.items()}


def _first(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def reason(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:300]
