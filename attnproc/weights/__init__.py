"""Published weight files: read into a model's attention, and written so that others load them."""

from .custom_diffusion import CustomDiffusionFile, read_custom_diffusion
from .ip_adapter import IPAdapterFile, read_ip_adapter
from .lora import LoRAFile, LoRAWeights, read_lora
from .lora_save import lora_of, save_lora
from .put import load_custom_diffusion, load_ip_adapter, load_lora
from .save import save_custom_diffusion, save_ip_adapter

__all__ = [
    "CustomDiffusionFile",
    "IPAdapterFile",
    "LoRAFile",
    "LoRAWeights",
    "load_custom_diffusion",
    "load_ip_adapter",
    "load_lora",
    "lora_of",
    "read_custom_diffusion",
    "read_ip_adapter",
    "read_lora",
    "save_custom_diffusion",
    "save_ip_adapter",
    "save_lora",
]
