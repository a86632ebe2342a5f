"""Attention processors for diffusion models, composed of parts."""

from . import presets
from .attention import Attention, MochiAttention, SanaMultiscaleLinearAttention
from .interop import SwapReport, restore, swap
from .kernels import Kernel, register_kernel
from .presets import *
from .processor import Processor
from .types import Recipe

__version__ = "0.1.0"

__all__ = [
    *presets.__all__,
    "Attention",
    "Kernel",
    "MochiAttention",
    "Processor",
    "Recipe",
    "SanaMultiscaleLinearAttention",
    "SwapReport",
    "register_kernel",
    "restore",
    "swap",
]
