"""Attention processors for diffusion models, composed of parts."""

from typing import TYPE_CHECKING, Any

from . import presets, steering
from .attention import Attention, MochiAttention, SanaMultiscaleLinearAttention
from .capture import Box, Maps, capture, components
from .interop import SwapReport, restore, swap
from .kernels import (
    Kernel,
    Takes,
    autotune,
    backend,
    explain,
    register_kernel,
    set_backend,
)
from .on import Layers, Snapshot, on
from .packing import pack, unpack
from .parallel import parallelize, unparallelize
from .presets import *
from .processor import Processor
from .schedules import Clock, Schedule
from .steering import Region, align, parse
from .types import Bias, Blocks, Causal, Keys, Recipe, Window

if TYPE_CHECKING:
    from . import html as html
    from . import plots as plots

__version__ = "0.1.0"

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    *presets.__all__,
    "Attention",
    "Bias",
    "Blocks",
    "Box",
    "Causal",
    "Clock",
    "Kernel",
    "Keys",
    "Layers",
    "Maps",
    "MochiAttention",
    "Processor",
    "Recipe",
    "Region",
    "SanaMultiscaleLinearAttention",
    "Schedule",
    "Snapshot",
    "SwapReport",
    "Takes",
    "Window",
    "align",
    "autotune",
    "backend",
    "capture",
    "components",
    "explain",
    "on",
    "register_kernel",
    "pack",
    "parse",
    "parallelize",
    "unpack",
    "unparallelize",
    "restore",
    "set_backend",
    "steering",
    "swap",
]


def __getattr__(name: str) -> Any:
    # On first use, and not in __all__: they need numpy and pillow, which the core does not.
    if name in ("html", "plots"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
