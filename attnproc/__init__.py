"""Attention processors for diffusion models, composed of parts."""

from . import presets
from .attention import Attention, MochiAttention, SanaMultiscaleLinearAttention
from .capture import Maps, capture
from .interop import SwapReport, restore, swap
from .kernels import Kernel, register_kernel
from .on import Layers, Snapshot, on
from .presets import *
from .processor import Processor
from .schedules import Clock, Schedule
from .types import Recipe

__version__ = "0.1.0"

__all__ = [
    *presets.__all__,
    "Attention",
    "Clock",
    "Kernel",
    "Layers",
    "Maps",
    "MochiAttention",
    "Processor",
    "Recipe",
    "SanaMultiscaleLinearAttention",
    "Schedule",
    "Snapshot",
    "SwapReport",
    "capture",
    "on",
    "register_kernel",
    "restore",
    "swap",
]
