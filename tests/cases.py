"""The table of configurations, which the package holds for `attnproc verify`, for the suites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from attnproc.verify.cases import CASES, CLASSES, Case, ModuleSpec, select
from attnproc.verify.check import quiet
from attnproc.verify.fakes import installed

__all__ = [
    "CASES",
    "CLASSES",
    "FIRST",
    "Case",
    "ModuleSpec",
    "each",
    "select",
    "some",
    "stand_ins",
]

# The plainest configuration of every class.
FIRST = {case.cls: case for case in reversed(CASES)}


@pytest.fixture
def stand_ins() -> Iterator[None]:
    """Stand-ins for packages that are not here, and no warnings of deprecated forms."""
    with installed(), quiet():
        yield


def each(cases: Iterable[Case], fast: int = 1) -> pytest.MarkDecorator:
    """A test for every case, under its id; every `fast`-th in the fast set."""
    return some("case", cases, fast, ids=lambda case: case.id)


def some(
    name: str, values: Iterable[Any], fast: int, ids: Callable[[Any], str] | None = None
) -> pytest.MarkDecorator:
    """A test for every value of an argument; every `fast`-th in the fast set."""
    params = [
        pytest.param(value, marks=[pytest.mark.slow] if i % fast else [])
        for i, value in enumerate(values)
    ]
    return pytest.mark.parametrize(name, params, ids=ids)
