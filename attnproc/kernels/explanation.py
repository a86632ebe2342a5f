"""Which kernels would run a call, which runs it, and why the others don't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..types import MaskKind
from .base import named, registered
from .functional import scoring_of
from .plan import AUTO, pick
from .scope import scope
from .takes import Ask, ask, why_not
from .tuned import tuned

__all__ = ["Explanation", "Verdict", "explain", "verdicts"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a call on one kernel.

    Attributes:
        name: The kernel's.
        reasons: Why it would not run; none if it would.
        note: What to know of it where it would.
    """

    name: str
    reasons: tuple[str, ...]
    note: str = ""

    @property
    def runs(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Explanation:
    """All kernels' verdicts on one call.

    Attributes:
        chosen: The kernel that runs it.
        why: By what that was chosen.
        verdicts: One a kernel.
    """

    chosen: str
    why: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        width = max(len(verdict.name) for verdict in self.verdicts)
        lines = [f"{self.chosen} runs: {self.why}"]
        for v in self.verdicts:
            text = "; ".join(v.reasons) or v.note or "would run"
            lines.append(f"{'+' if v.runs else '-'} {v.name:<{width}}  {text}")
        return "\n".join(lines)

    def __getitem__(self, name: str) -> Verdict:
        return next(v for v in self.verdicts if v.name == named(name).name)


def explain(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    mask: Tensor | MaskKind | None = None,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    dropout: float = 0.0,
    backend: Any = None,
    return_lse: bool = False,
) -> Explanation:
    """Says which kernel runs a call and why each other would or would not; nothing is computed.

    The arguments are those of `attnproc.kernels.attention`; `k` and `v` are `q` unless given.
    """
    k = q if k is None else k
    v = k if v is None else v
    scoring = scoring_of(q, k, mask, causal=causal, scale=scale, dropout=dropout)
    return verdicts(ask(q, k, v, scoring, return_lse), backend)


def verdicts(asked: Ask, backend: Any = None) -> Explanation:
    """The explanation of a kind of call."""
    wish = scope(compiling=False) if backend is None else None
    name = backend if wish is None else wish.name
    by = "the table of autotune" if tuned(asked) else "rules"
    chosen, why = pick(asked).name, f"the automatic choice, by {by}"
    if name is not None and named(name) != AUTO:
        kernel = named(name)
        by = "it was named" if backend is not None else "the block names it"
        chosen, why = kernel.name, by
        if why_not(kernel.takes, asked):
            chosen, why = "none", f"{kernel.name} is asked for and does not take the call"
    rows = [
        Verdict(kernel.name, tuple(why_not(kernel.takes, asked)), _note(kernel.name, asked))
        for kernel in registered().values()
        if kernel != AUTO
    ]
    return Explanation(chosen, why, tuple(rows))


def _note(name: str, asked: Ask) -> str:
    kernel = named(name)
    if not kernel.takes.exact:
        return "would run; it quantises, so only its name picks it"
    size = asked.batch * asked.heads * asked.queries * asked.keys
    if name in ("math", "reference"):
        return f"would run; it holds all {size:,} scores"
    dense = asked.kinds & {"window", "blocks"} or {"causal", "keys"} <= asked.kinds
    if dense and name in ("sdpa", "flash_sdpa", "cudnn", "efficient"):
        return f"would run; it needs a dense mask of {asked.queries:,} x {asked.keys:,}"
    return ""
