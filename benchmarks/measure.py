"""Times and memory of calls, the sides by turns.

Eager time is amortised: a batch of calls is enqueued, then waited for once, so that a figure is
the larger of the CPU's cost and the GPU's time, as it is inside a model.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "RISE",
    "Call",
    "Times",
    "by_turns",
    "graphed",
    "host",
    "kernel_times",
    "noiseless",
    "peak_mib",
    "time_limit",
    "wait",
]

Call = Callable[[], Any]
_ROUNDS = 5
RISE = {"cuda": 0.1, "cpu": 0.0}
"""Seconds that a device may take to reach its clocks when it idled, as while code was compiled."""
# A batch is to take this long, so that waiting for it costs next to nothing.
_BATCH = {"cuda": 0.01, "cpu": 0.002}
_FEWEST, _MOST = {"cuda": 4, "cpu": 1}, 200


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call.

    Attributes:
        median: Over the batches.
        least: Of the fastest batch: what a noisy machine shows of a quiet one.
    """

    median: float
    least: float

    def named(self, mode: str) -> dict[str, float]:
        """As entries of a side's results."""
        return {f"{mode}_ms": round(self.median, 5), f"{mode}_min_ms": round(self.least, 5)}


def by_turns(
    calls: Mapping[str, Call], device: str, seconds: float, rise: float = 0.0
) -> dict[str, Times]:
    """Amortised time of each call, a batch of one after a batch of the other.

    Args:
        calls: What is timed, by side.
        device: "cpu" or "cuda".
        seconds: Roughly how long all of it takes; five batches a side at least.
        rise: Seconds of batches before those.

    Returns:
        Times by side.
    """
    sizes = {side: _size(call, device) for side, call in calls.items()}
    batches = {side: _batch(call, sizes[side], device) for side, call in calls.items()}
    return _sampled(batches, seconds, rise)


def host(calls: Mapping[str, Call], device: str, seconds: float) -> dict[str, Times]:
    """What a call costs the CPU: time to enqueue a few on an empty queue, not waited for."""
    for call in calls.values():
        _warm(call, device)
    return _sampled({side: _enqueued(call, device) for side, call in calls.items()}, seconds)


def _sampled(
    batches: Mapping[str, Callable[[], float]], seconds: float, rise: float = 0.0
) -> dict[str, Times]:
    """Times of batches by turns, but for those of the first `rise` seconds."""
    samples: dict[str, list[float]] = {side: [] for side in batches}
    rounds = 0
    with noiseless():
        start = time.perf_counter()
        while time.perf_counter() < start + rise:
            for batch in batches.values():
                batch()
        end = time.perf_counter() + seconds
        while rounds < _ROUNDS or time.perf_counter() < end:
            for side, batch in batches.items():
                samples[side].append(batch() * 1e3)
            rounds += 1
    return {side: Times(statistics.median(some), min(some)) for side, some in samples.items()}


def _batch(call: Call, size: int, device: str) -> Callable[[], float]:
    def batch() -> float:
        start = time.perf_counter()
        for _ in range(size):
            call()
        wait(device)
        return (time.perf_counter() - start) / size

    return batch


def _enqueued(call: Call, device: str, size: int = 4) -> Callable[[], float]:
    def batch() -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(size):
            call()
        took = time.perf_counter() - start
        wait(device)
        return took / size

    return batch


def _size(call: Call, device: str) -> int:
    """How many calls a batch has."""
    _warm(call, device)
    took = min(_batch(call, 2, device)() for _ in range(2))
    return min(max(math.ceil(_BATCH[device] / took), _FEWEST[device]), _MOST)


def _warm(call: Call, device: str, times: int = 3) -> None:
    for _ in range(times if device == "cuda" else 1):
        call()
    wait(device)


def graphed(call: Call, copies: int = 1) -> Call:
    """The replay of a CUDA graph of the call: the GPU's own time, without launches.

    Args:
        call: What is captured.
        copies: How many calls the graph holds, one after the other.

    Raises:
        RuntimeError: It can't be captured; the message says what it did.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(copies):
                call()
    except BaseException:
        torch.cuda.synchronize()
        _renew_generator()
        raise
    return graph.replay


def kernel_times(call: Call, times: int = 20) -> dict[str, tuple[float, float]]:
    """What the GPU does in a call, the longest first.

    Returns:
        By the kernel's name how often a call launches it, and the ms that takes together.
    """
    _warm(call, "cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    found = {
        event.key: (event.count / times, round(event.device_time_total / times / 1e3, 5))
        for event in seen.key_averages()
        if event.device_time_total
    }
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _renew_generator() -> None:
    """A capture that failed leaves the GPU's generator believing that it is captured still."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    with contextlib.suppress(RuntimeError):
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())


def peak_mib(call: Call, device: str) -> float:
    """The most memory that a call holds at a time, above what was held before it."""
    call()
    if device == "cpu":
        return _counted(call) / 2**20
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def _counted(call: Call) -> int:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from peak import peak_bytes

    return peak_bytes(call)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def noiseless() -> Generator[None]:
    """No garbage collection amid the timing."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Raises TimeoutError in a block that takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
