"""Every kernel equals the float64 oracle in each case that it takes, and refuses the others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import ALL_DTYPES, Case, check, draw_case

from attnproc.kernels import FLEX, attention, registered

# FlexAttention compiles every shape anew: it has a test of its own.
KERNELS = [kernel for kernel in registered().values() if kernel != FLEX]


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = ALL_DTYPES, **limits: Any) -> Case:
    return draw_case(lambda options: draw(st.sampled_from(options)), dtypes, **limits)


def holds(case: Case) -> None:
    outcomes = Counter(check(case, kernel) for kernel in KERNELS)
    # The automatic choice and the tiles take everything.
    assert outcomes["equal"] >= 4, outcomes


QUIET = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}


@settings(max_examples=200, **QUIET)
@given(cases())
def test_kernels_equal_the_oracle_or_refuse(case: Case) -> None:
    holds(case)


@pytest.mark.slow
@settings(max_examples=2000, **QUIET)
@given(cases())
def test_kernels_equal_the_oracle_or_refuse_in_many_cases(case: Case) -> None:
    holds(case)


def traced(*inputs: Any, **options: Any) -> Any:
    """`attention` as one graph, with torch's eager stand-in for the compiled kernel."""
    torch._dynamo.reset()
    run = torch.compile(attention, backend="eager", fullgraph=True, dynamic=False)
    return run(*inputs, **options)


# What FlexAttention takes on a CPU.
FLEXIBLE = cases(dtypes=(torch.float32,), dims=(16, 40, 64), grads=(False,))
NO_SHRINKING = {**QUIET, "phases": (Phase.explicit, Phase.generate)}


@settings(max_examples=8, **NO_SHRINKING)
@given(FLEXIBLE)
def test_flex_equals_the_oracle_in_a_graph(case: Case) -> None:
    check(case, FLEX, traced)


@pytest.mark.slow
@settings(max_examples=100, **NO_SHRINKING)
@given(FLEXIBLE)
def test_flex_equals_the_oracle_in_a_graph_in_many_cases(case: Case) -> None:
    check(case, FLEX, traced)


@pytest.mark.slow
@settings(max_examples=3, **NO_SHRINKING)
@given(FLEXIBLE)
def test_flex_compiled_equals_the_oracle(case: Case) -> None:
    check(case, FLEX)


@pytest.mark.parametrize("name", ["auto", "chunked"])
@settings(max_examples=5, **NO_SHRINKING)
@given(cases(dtypes=(torch.float32,)))
def test_kernels_are_one_graph(name: str, case: Case) -> None:
    check(case, registered()[name], traced)
