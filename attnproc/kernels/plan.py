"""Which kernel runs a call: by rules where none was named, by name with a check where one was."""

from __future__ import annotations

import warnings

from torch import Tensor

from ..tracing import constant
from ..types import Scoring
from .apart import apart, worth_parting
from .base import Kernel, registered
from .channel import by_channel, worth_a_channel
from .chunked import CHUNKED
from .flex import FLEX
from .native import BOUNDED, SDPA, sdpa
from .short import SHORT, is_short, worth_it
from .takes import Ask, Takes, ask, why_not
from .tuned import is_tuned, tuned
from .varlen import VARLEN

__all__ = [
    "AUTO",
    "Refused",
    "automatic",
    "checked",
    "forget",
    "lse_of",
    "pick",
    "serving",
]

# From here on a mask of positions is worth a compilation, or packing worth a gather.
_STRUCTURED = 1 << 20

_PICKED: dict[Ask, Kernel] = {}
_REASONS: dict[tuple[Kernel, Ask], tuple[str, ...]] = {}


class Refused(ValueError):
    """A kernel that was asked for by name does not take the call."""


def automatic(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """The kernel that the table or the rules pick for this kind of call."""
    if scoring.only_causal and not is_short(q, k, v) and not is_tuned(q):
        return sdpa(q, k, v, scoring)
    if worth_parting(q, k, v, scoring):
        o = apart(q, k, v, scoring)
        if o is not None:
            return o
    if not is_tuned(q) and worth_a_channel(q, k, v, scoring):
        return by_channel(q, k, v, scoring)
    return pick(ask(q, k, v, scoring))(q, k, v, scoring)


def automatic_lse(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """As `automatic`, among the kernels that give the log-sum-exp."""
    return lse_of(pick(ask(q, k, v, scoring, lse=True)), q, k, v, scoring)


AUTO = Kernel(
    "auto",
    automatic,
    takes=Takes(dropout=True, lse=True),
    with_lse=automatic_lse,
    bounded=BOUNDED,
)


def pick(asked: Ask) -> Kernel:
    """The fastest exact kernel by the table of this machine, else by rules."""
    if asked.compiling:
        return tuned(asked) or _by_rule(asked)
    kernel = _PICKED.get(asked)
    if kernel is None:
        kernel = _PICKED[asked] = tuned(asked) or _by_rule(asked)
    return kernel


def _by_rule(asked: Ask) -> Kernel:
    for kernel in _order(asked):
        if not why_not(kernel.takes, asked):
            return kernel
    return CHUNKED if asked.lse else SDPA


def _order(asked: Ask) -> tuple[Kernel, ...]:
    """What to try, the best first."""
    if asked.kinds <= {"causal"} and worth_it(asked):
        return SHORT, SDPA
    # Padding by a mask was faster than packing in 3 of 4 models on an H100, and takes a fifth of
    # the memory (benchmarks/results/kernels-nvidia-h100-80gb-hbm3.json).
    if asked.kinds <= {"causal"} or asked.kinds <= {"keys", "dense", "bias", "learned"}:
        return (SDPA,)
    # As one dense mask this would be Q x K.
    if asked.queries * asked.keys < _STRUCTURED:
        return (SDPA,)
    return (CHUNKED,) if asked.device == "cpu" else (VARLEN, FLEX, CHUNKED)


def checked(
    kernel: Kernel,
    fallback: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a kernel that was named, if it takes the call.

    Args:
        kernel: The kernel.
        fallback: `"warn"` runs the automatic choice in its place, with a warning.
        q: ``[B, H, Q, D]``; `k` and `v` are ``[B, H', K, D]``.
        k: Keys.
        v: Values.
        scoring: Masks and scale.
        lse: Whether the log-sum-exp is wanted too.

    Raises:
        Refused: It does not take the call, for the reasons given, and there is no fallback.
        ImportError: Its package is not here.
    """
    asked = ask(q, k, v, scoring, lse)
    reasons = _reasons(kernel, asked)
    if reasons:
        if fallback != "warn":
            _refuse(kernel, asked, reasons)
        _warn(kernel.name, reasons)
        kernel = pick(asked)
    return lse_of(kernel, q, k, v, scoring) if lse else kernel(q, k, v, scoring)


def lse_of(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a kernel that gives both."""
    if kernel.with_lse is None:
        raise Refused(f"backend {kernel.name!r} gives no log-sum-exp")
    return kernel.with_lse(q, k, v, scoring, *kernel.options)


def _reasons(kernel: Kernel, asked: Ask) -> tuple[str, ...]:
    if asked.compiling:
        return tuple(why_not(kernel.takes, asked))
    found = _REASONS.get((kernel, asked))
    if found is None:
        found = _REASONS[kernel, asked] = tuple(why_not(kernel.takes, asked))
    return found


def _refuse(kernel: Kernel, asked: Ask, reasons: tuple[str, ...]) -> None:
    message = f"backend {kernel.name!r} does not take this call: {'; '.join(reasons)}"
    if "is not installed" in reasons[0]:
        raise ImportError(message)
    raise Refused(f"{message}. These would: {', '.join(serving(asked)) or 'none'}")


def serving(asked: Ask) -> list[str]:
    """The names of the kernels that take a call."""
    kernels = registered().values()
    return [kernel.name for kernel in kernels if not why_not(kernel.takes, asked)]


@constant
def _warn(name: str, reasons: tuple[str, ...]) -> None:
    warnings.warn(
        f"backend {name!r} does not take this call, the automatic choice runs: "
        f"{'; '.join(reasons)}",
        stacklevel=4,
    )


def forget() -> None:
    """Drops the plans that were made, after a change of kernels or of the table."""
    _PICKED.clear()
    _REASONS.clear()
