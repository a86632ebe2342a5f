"""Attention maps of chosen queries and keys, exact, beside any kernel."""

from ..places import Box
from .components import Components, components
from .maps import Maps
from .part import Capture
from .saving import load
from .weights import key_weights, weights
from .within import capture

__all__ = [
    "Box",
    "Capture",
    "Components",
    "Maps",
    "capture",
    "components",
    "key_weights",
    "load",
    "weights",
]
