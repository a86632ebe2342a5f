"""Every processor in every configuration gives what its reference gives, gradients too."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, each
from naive import naive
from torch import Tensor

from attnproc.verify.build import Result, build, diffusers_found, evaluate
from attnproc.verify.check import Outcome, agree, compare, expected, low_precision
from attnproc.verify.golden import load_golden

pytestmark = pytest.mark.usefixtures("stand_ins")

needs_diffusers = pytest.mark.skipif(not diffusers_found(), reason="diffusers is not here")
COMPARED = [case for case in CASES if case.compare == "diffusers"]
# Families that the oracle does not cover: it stands for what diffusers gets wrong.
UNCOVERED = ("LoRA", "Flux", "Multiscale")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_golden()


@needs_diffusers
@each(CASES)
def test_values_and_gradients(case: Case) -> None:
    assert compare(case).failures == []


@needs_diffusers
@each(case for case in CASES if "train" not in case.setup)
def test_low_precision(case: Case) -> None:
    outcome = Outcome(case)
    low_precision(outcome)
    assert outcome.failures == []


@each(CASES)
def test_stored_results_on_own_modules(case: Case, golden: dict[str, Tensor]) -> None:
    assert compare(case, golden).failures == []


@needs_diffusers
@each(
    case
    for case in COMPARED
    if "train" not in case.setup and not any(part in case.cls for part in UNCOVERED)
)
def test_oracle_agrees_where_diffusers_is_right(case: Case) -> None:
    theirs = build(case, "theirs", torch.float64)
    outputs = naive(case.cls, theirs.attn, theirs.processor, theirs.inputs)
    outcome = Outcome(case)
    agree(outcome, evaluate(theirs, outputs), Result(outputs, {}), expected(case))
    assert outcome.failures == []


def test_table_is_complete() -> None:
    import attnproc.presets

    assert {case.cls for case in CASES} == set(attnproc.presets.__all__)
    assert len({case.id for case in CASES}) == len(CASES) >= 240
