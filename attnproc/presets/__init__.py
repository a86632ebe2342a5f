"""The 52 attention processors of diffusers, each a few declared lines."""

from . import adapters, dit, joint, unet
from .adapters import *
from .dit import *
from .joint import *
from .unet import *

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    *unet.__all__,
    *adapters.__all__,
    *joint.__all__,
    *dit.__all__,
]
