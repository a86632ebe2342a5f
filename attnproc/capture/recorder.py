"""Base of the parts that record beside the kernel call, also from compiled code."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from torch import Tensor

from ..records import record, ticket_for

__all__ = ["Recorder", "record"]


@dataclass(frozen=True)
class Recorder:
    """Base of the parts that record beside the kernel call: the outermost of the wrappers.

    Attributes:
        ticket: What compiled code records by.
    """

    ticket: Tensor = field(init=False, repr=False, compare=False)
    name: ClassVar[str] = "capture"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ticket", ticket_for(cast("Any", self)))

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, f.name) for f in fields(self) if f.init)
