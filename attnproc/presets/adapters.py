"""U-Nets with adapters: image prompts, low-rank updates, Custom Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..calls import LoRACall, PlainCall, PromptCall
from ..edits import detach_first_token
from ..frame import BARE
from ..kernels import XFORMERS
from ..linears import (
    CustomDiffusion,
    LoRA,
    module_linear,
    mount_custom_diffusion,
    mount_lora,
)
from ..processor import Holder
from ..prompts import Scale, decoupled, mount_prompts
from .unet import ADDED_KV, PLAIN, ByXFormers

__all__ = [
    "CustomDiffusionAttnProcessor",
    "CustomDiffusionAttnProcessor2_0",
    "CustomDiffusionXFormersAttnProcessor",
    "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0",
    "IPAdapterXFormersAttnProcessor",
    "LoRAAttnAddedKVProcessor",
    "LoRAAttnProcessor",
    "LoRAAttnProcessor2_0",
    "LoRAXFormersAttnProcessor",
]

PROMPTED = PLAIN.but(prompts=(decoupled,))
CUSTOM = PLAIN.but(
    frame=BARE, linears=(CustomDiffusion(), module_linear), edits=(detach_first_token,)
)


def attention_widths(wide: int, own: int) -> dict[str, tuple[int, int]]:
    """Input and output width of the projections of a layer `own` wide, its context `wide`."""
    return {"to_q": (own, own), "to_k": (wide, own), "to_v": (wide, own), "to_out": (own, own)}


# Long constructors stand as diffusers has them, a few lines each.
# fmt: off
class IPAdapterAttnProcessor2_0(PromptCall, Holder):
    """Attention plus one attention an image prompt (IP-Adapter).

    Args:
        hidden_size: Width of the attention layer.
        cross_attention_dim: Width of the prompts' states; None is `hidden_size`.
        num_tokens: Tokens of each prompt.
        scale: Weight of each prompt; one number for all or a list, whose entries may be lists with
            a number for each masked image. Callers may write `scale` at any time.

    Raises:
        ValueError: `scale` is a list of another length than `num_tokens`.
    """

    recipe = PROMPTED

    def __init__(
        self, hidden_size: int, cross_attention_dim: int | None = None,
        num_tokens: int | Sequence[int] = (4,), scale: Scale = 1.0,
    ) -> None:
        super().__init__()
        mount_prompts(self, hidden_size, cross_attention_dim, num_tokens, scale)


class IPAdapterAttnProcessor(IPAdapterAttnProcessor2_0):
    """As `IPAdapterAttnProcessor2_0`, under its older name."""

    recipe = PROMPTED


class IPAdapterXFormersAttnProcessor(ByXFormers, IPAdapterAttnProcessor2_0):
    """As `IPAdapterAttnProcessor2_0`, by xformers with the operator `attention_op`."""

    recipe = PROMPTED.but(kernel=XFORMERS)

    def __init__(
        self, hidden_size: int, cross_attention_dim: int | None = None,
        num_tokens: int | Sequence[int] = (4,), scale: Scale = 1.0, attention_op: Any = None,
    ) -> None:
        super().__init__(hidden_size, cross_attention_dim, num_tokens, scale)
        self.attention_op = attention_op


class CustomDiffusionAttnProcessor2_0(PlainCall, Holder):
    """Attention with projections of its own (Custom Diffusion).

    Args:
        train_kv: Whether it has its own projections of keys and values.
        train_q_out: Whether it has its own projections of queries and of the output.
        hidden_size: Width of the attention layer.
        cross_attention_dim: Width of the context; None is `hidden_size`.
        out_bias: Whether the output projection has a bias.
        dropout: Probability of dropout after it, in training.

    Raises:
        ValueError: Projections are asked for without `hidden_size`.
    """

    recipe = CUSTOM

    def __init__(
        self, train_kv: bool = True, train_q_out: bool = True, hidden_size: int | None = None,
        cross_attention_dim: int | None = None, out_bias: bool = True, dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.train_kv, self.train_q_out = train_kv, train_q_out
        self.hidden_size, self.cross_attention_dim = hidden_size, cross_attention_dim
        if not (train_kv or train_q_out):
            return
        if hidden_size is None:
            raise ValueError(
                "hidden_size is None: it is needed with train_kv or train_q_out; give the width "
                "of the attention layer"
            )
        wide = cross_attention_dim or hidden_size
        mount_custom_diffusion(self, attention_widths(wide, hidden_size), out_bias, dropout)


class CustomDiffusionXFormersAttnProcessor(ByXFormers, CustomDiffusionAttnProcessor2_0):
    """As `CustomDiffusionAttnProcessor2_0`, by xformers with the operator `attention_op`."""

    recipe = CUSTOM.but(kernel=XFORMERS)

    def __init__(
        self, train_kv: bool = True, train_q_out: bool = False, hidden_size: int | None = None,
        cross_attention_dim: int | None = None, out_bias: bool = True, dropout: float = 0.0,
        attention_op: Any = None,
    ) -> None:
        super().__init__(
            train_kv, train_q_out, hidden_size, cross_attention_dim, out_bias, dropout
        )
        self.attention_op = attention_op


class CustomDiffusionAttnProcessor(CustomDiffusionAttnProcessor2_0):
    """As `CustomDiffusionAttnProcessor2_0`, under its older name."""

    recipe = CUSTOM


class LoRAAttnProcessor2_0(LoRACall, Holder):
    """Attention with low-rank updates of its projections.

    Args:
        hidden_size: Width of the attention layer; None gives the plain processor.
        cross_attention_dim: Width of the context; None is `hidden_size`.
        rank: Width between the two layers of an update.
        network_alpha: The updates' weight is `network_alpha / rank`; None is a weight of 1.
    """

    recipe = PLAIN

    def __init__(
        self, hidden_size: int | None = None, cross_attention_dim: int | None = None,
        rank: int = 4, network_alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.cross_attention_dim = hidden_size, cross_attention_dim
        self.rank, self.network_alpha = rank, network_alpha
        if hidden_size is None:
            return
        wide, own = cross_attention_dim or hidden_size, hidden_size
        mount_lora(self, self._widths(wide, own), rank, network_alpha)
        self.__dict__["recipe"] = self.recipe.but(linears=(*self.recipe.linears, LoRA()))

    @staticmethod
    def _widths(wide: int, own: int) -> dict[str, tuple[int, int]]:
        """Input and output width of each adapted projection."""
        return attention_widths(wide, own)


class LoRAAttnProcessor(LoRAAttnProcessor2_0):
    """As `LoRAAttnProcessor2_0`, under its older name."""

    recipe = PLAIN


class LoRAAttnAddedKVProcessor(LoRAAttnProcessor2_0):
    """As `LoRAAttnProcessor`, with the added projections adapted too."""

    recipe = ADDED_KV

    @staticmethod
    def _widths(wide: int, own: int) -> dict[str, tuple[int, int]]:
        names = ("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj")
        return {name: (wide if name.startswith("add") else own, own) for name in names}


class LoRAXFormersAttnProcessor(ByXFormers, LoRAAttnProcessor2_0):
    """As `LoRAAttnProcessor2_0`, by xformers with the operator `attention_op`."""

    recipe = PLAIN.but(kernel=XFORMERS)

    def __init__(
        self, hidden_size: int | None = None, cross_attention_dim: int | None = None,
        rank: int = 4, attention_op: Any = None, network_alpha: float | None = None,
    ) -> None:
        super().__init__(hidden_size, cross_attention_dim, rank, network_alpha)
        self.attention_op = attention_op
# fmt: on
