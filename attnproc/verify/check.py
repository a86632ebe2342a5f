"""One case checked: ours against the reference in fp64, in low precision, and as one graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo as dynamo  # pyright: ignore[reportPrivateUsage]
from torch import Tensor
from torch._dynamo.exc import Unsupported  # pyright: ignore[reportPrivateUsage]

from attnproc.verify.build import Result, Setting, build, evaluate
from attnproc.verify.naive import naive
from attnproc.verify.specs import Case

__all__ = [
    "Outcome",
    "agree",
    "check",
    "compare",
    "digest",
    "expected",
    "graph_breaks",
    "low_precision",
    "quiet",
]

TOLERANCE = 1e-5
LOW = (torch.bfloat16, torch.float16)


@dataclass
class Outcome:
    """What came of a case: the worst error, relative to the size of what was compared."""

    case: Case
    error: float = 0.0
    breaks: int | None = None
    failures: list[str] = field(default_factory=list[str])

    def note(self, what: str, error: float, allowed: float) -> None:
        """Count an error; NaN fails too."""
        if not error <= allowed:
            self.failures.append(f"{what}: {error:.2e} is over {allowed:.2e}")


def check(case: Case, golden: Mapping[str, Tensor] | None = None, low: bool = True) -> Outcome:
    """As `compare`, with bf16 and fp16 if `low`; an exception is a failure, not an end."""
    try:
        outcome = compare(case, golden)
        if low:
            low_precision(outcome, own=golden is not None)
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(case, failures=[message])
    return outcome


def compare(case: Case, golden: Mapping[str, Tensor] | None = None) -> Outcome:
    """Compare our class with the case's reference, in float32.

    Args:
        case: the configuration.
        golden: stored results; then our own modules carry the processor, without diffusers.

    Returns:
        The worst error and what failed.
    """
    outcome = Outcome(case)
    own = golden is not None
    ours = build(case, "ours", torch.float32, own_modules=own)
    # The first call goes through the module, as a model's does; the second is direct.
    mine = evaluate(ours, ours.call(direct=False), case.grads)
    with torch.no_grad():
        again = Result(tuple(ours.call()), {})
    if golden is not None and case.compare == "diffusers":
        _against_golden(outcome, mine, golden)
    else:
        agree(outcome, mine, again, expected(case, own))
    return outcome


def expected(case: Case, own: bool = False, rounded: torch.dtype | None = None) -> Result:
    """The reference in float64: diffusers', or the naive oracle's."""
    grads = case.grads and rounded is None
    if case.compare == "diffusers" and not own:
        theirs = build(case, "theirs", torch.float64, rounded=rounded)
        return evaluate(theirs, theirs.call(), grads)
    ours = build(case, "ours", torch.float64, rounded=rounded, own_modules=own)
    if case.compare == "diffusers":
        return evaluate(ours, ours.call(), grads)
    outputs = naive(case.cls, ours.attn, ours.processor, ours.inputs)
    return evaluate(ours, outputs, grads)


def low_precision(outcome: Outcome, own: bool = False) -> None:
    """bf16 and fp16: our error against float64 is of the size of diffusers' own."""
    case = outcome.case
    if "train" in case.setup:
        return
    for dtype in LOW:
        right = expected(case, own, rounded=dtype)
        ours = build(case, "ours", dtype, own_modules=own)
        allowed = [8 * torch.finfo(dtype).eps] * len(right.outputs)
        if case.compare == "diffusers" and not own:
            theirs = build(case, "theirs", dtype)
            with torch.no_grad():
                errors = map(_spread, theirs.call(), right.outputs)
            allowed = [1.5 * error + torch.finfo(dtype).eps for error in errors]
        with torch.no_grad():
            outputs = ours.call()
        for i, (out, want, most) in enumerate(zip(outputs, right.outputs, allowed, strict=True)):
            if out.dtype != dtype:
                outcome.failures.append(f"output {i}: {out.dtype} for {dtype}")
            outcome.note(f"output {i} in {str(dtype)[6:]}", _spread(out, want), most)


def agree(outcome: Outcome, mine: Result, again: Result, right: Result) -> None:
    """Note where outputs (of both calls) or gradients are not what is right."""
    for label, outputs in ("", mine.outputs), (" (direct)", again.outputs):
        if len(outputs) != len(right.outputs):
            outcome.failures.append(f"{len(outputs)} outputs{label}, not {len(right.outputs)}")
        for i, (out, want) in enumerate(zip(outputs, right.outputs, strict=False)):
            _count(outcome, f"output {i}{label}", out, want, _size(want))
    top = max(map(_size, right.grads.values()), default=0.0)
    for name in sorted(mine.grads.keys() | right.grads.keys()):
        got, want = mine.grads.get(name), right.grads.get(name)
        if got is None or want is None:
            side = "ours" if want is None else "the reference"
            outcome.failures.append(f"gradient {name}: only in {side}")
        else:
            # Some gradients (a key's bias) are zero but for rounding.
            _count(outcome, f"gradient {name}", got, want, max(_size(want), 0.1 * top))


def _count(outcome: Outcome, what: str, got: Tensor, want: Tensor, size: float) -> None:
    if got.shape != want.shape:
        outcome.failures.append(f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}")
        return
    error = (got.double() - want.double()).abs().max().item() / (size or 1.0)
    outcome.error = max(outcome.error, error)
    outcome.note(what, error, TOLERANCE)


def _against_golden(outcome: Outcome, mine: Result, golden: Mapping[str, Tensor]) -> None:
    for name, tensor in digest(mine).items():
        want = golden[f"{outcome.case.id}/{name}"]
        _count(outcome, name, tensor, want, _size(want))


def digest(result: Result) -> dict[str, Tensor]:
    """What is stored of a result: at most 192 numbers and the norm of an output, grads' norms."""
    kept: dict[str, Tensor] = {}
    for i, out in enumerate(result.outputs):
        numbers = out.double().flatten()
        step = max(1, -(-numbers.numel() // 192)) | 1
        kept[f"out.{i}"] = torch.cat([numbers[::step], numbers.norm()[None] / step]).float()
    if result.grads:
        norms = [result.grads[name].double().norm() for name in sorted(result.grads)]
        kept["grads"] = torch.stack(norms).float()
    return kept


def _size(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


def _spread(got: Tensor, want: Tensor) -> float:
    """Root mean square error, relative to the root mean square of what is right."""
    return ((got.double() - want).norm() / want.norm()).item()


def graph_breaks(case: Case, own: bool = False) -> int:
    """In how many places torch.compile leaves the graph of this case: zero is one graph."""
    setting = build(case, "ours", torch.float32, own_modules=own)
    dynamo.reset()
    try:
        run = torch.compile(_plain_call, backend="eager", fullgraph=True)
        got = run(setting)
    except Unsupported:
        dynamo.reset()
        return max(1, dynamo.explain(_plain_call)(setting).graph_break_count)
    if "train" not in case.setup:
        torch.testing.assert_close(got, _plain_call(setting), rtol=1e-4, atol=1e-5)
    return 0


def _plain_call(setting: Setting) -> Any:
    return setting.processor(setting.attn, **setting.inputs)


@contextmanager
def quiet() -> Generator[None]:
    """No warnings of either side: deprecated forms are among the cases."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)
