"""Attention processors for diffusion models, composed of parts."""

from . import presets
from .attention import Attention, MochiAttention, SanaMultiscaleLinearAttention
from .capture import Maps, capture
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
from .types import Bias, Blocks, Causal, Keys, Recipe, Window

__version__ = "0.1.0"

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    *presets.__all__,
    "Attention",
    "Bias",
    "Blocks",
    "Causal",
    "Clock",
    "Kernel",
    "Keys",
    "Layers",
    "Maps",
    "MochiAttention",
    "Processor",
    "Recipe",
    "SanaMultiscaleLinearAttention",
    "Schedule",
    "Snapshot",
    "SwapReport",
    "Takes",
    "Window",
    "autotune",
    "backend",
    "capture",
    "explain",
    "on",
    "register_kernel",
    "pack",
    "parallelize",
    "unpack",
    "unparallelize",
    "restore",
    "set_backend",
    "swap",
]
