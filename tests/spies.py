"""Functions that tell of their calls."""

from __future__ import annotations

from typing import Any

import pytest


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The arguments of each call of a function from now on, which does what it did."""
    calls: list[Any] = []
    plain = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append(args) or plain(*args))
    return calls
