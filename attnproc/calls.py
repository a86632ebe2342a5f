"""The signatures of `__call__`, as diffusers' attention modules call them.

A module passes only the keywords that a signature names, so each also names, by keyword only, what
composed parts may need: `temb`, `ip_hidden_states`, `ip_adapter_masks`. Where diffusers tolerates
and ignores further arguments (an old `scale`), so do these.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .processor import Context, Processor

__all__ = [
    "AddedCall",
    "AuraFlowCall",
    "CogVideoXCall",
    "FluxCall",
    "FluxPromptCall",
    "GridCall",
    "JointPromptCall",
    "LoRACall",
    "LuminaCall",
    "MochiCall",
    "PlainCall",
    "PromptCall",
    "RotaryCall",
    "StableAudioCall",
    "TembCall",
    "UNetCall",
]

T = Tensor | None


# fmt: off
class UNetCall(Processor):
    """Self or cross attention of a U-Net."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, temb: T = None, *args: Any,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None, **kwargs: Any,
    ) -> Tensor:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb, None,
                        ip_hidden_states, ip_adapter_masks)


class TembCall(Processor):
    """As `UNetCall`, taking no further arguments."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, temb: T = None, *,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Tensor:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb, None,
                        ip_hidden_states, ip_adapter_masks)


class PlainCall(Processor):
    """As `TembCall`, with `temb` by keyword only."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, *, temb: T = None,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb, None,
                        ip_hidden_states, ip_adapter_masks)


class AddedCall(Processor):
    """Added key-values and joint attention: as `PlainCall`, tolerating further arguments."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, *args: Any, temb: T = None,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None, **kwargs: Any,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb, None,
                        ip_hidden_states, ip_adapter_masks)


class LoRACall(Processor):
    """A U-Net's call with the weight of the low-rank updates."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, scale: float | Tensor = 1.0, temb: T = None, *,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Tensor:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb, None,
                        ip_hidden_states, ip_adapter_masks, lora_scale=scale)


class PromptCall(Processor):
    """A U-Net's call with image prompts; `scale` is ignored, the processor's own rules.

    The context is (text, image states); a tensor holds the first prompt's tokens at its end.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, temb: T = None, scale: float = 1.0,
        ip_adapter_masks: Any = None, *, ip_hidden_states: Any = None,
    ) -> Tensor:
        context = encoder_hidden_states
        if isinstance(context, Tensor) and ip_hidden_states is None and self.recipe.prompts:
            end = context.shape[1] - self.num_tokens[0]
            context = (context[:, :end], [context[:, end:]])
        return self.run(attn, hidden_states, context, attention_mask, temb, None,
                        ip_hidden_states, ip_adapter_masks)


class JointPromptCall(Processor):
    """Joint attention with an image prompt (SD3)."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, ip_hidden_states: Any = None, temb: T = None, *,
        ip_adapter_masks: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb, None,
                        ip_hidden_states, ip_adapter_masks)


class AuraFlowCall(Processor):
    """Joint attention of AuraFlow; the mask comes by keyword."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        *args: Any, attention_mask: T = None, temb: T = None,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None, **kwargs: Any,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb, None,
                        ip_hidden_states, ip_adapter_masks)


class RotaryCall(Processor):
    """Self or cross attention with a rotary table."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, temb: T = None, image_rotary_emb: Any = None, *,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb,
                        image_rotary_emb, ip_hidden_states, ip_adapter_masks)


class FluxCall(Processor):
    """Joint or self attention of Flux."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, image_rotary_emb: Any = None, *, temb: T = None,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb,
                        image_rotary_emb, ip_hidden_states, ip_adapter_masks)


class FluxPromptCall(Processor):
    """Joint attention of Flux with image prompts."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, image_rotary_emb: Any = None, ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None, *, temb: T = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb,
                        image_rotary_emb, ip_hidden_states, ip_adapter_masks)


class CogVideoXCall(Processor):
    """Joint attention that always has a text."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context,
        attention_mask: T = None, image_rotary_emb: Any = None, *, temb: T = None,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb,
                        image_rotary_emb, ip_hidden_states, ip_adapter_masks)


class MochiCall(Processor):
    """Joint attention that always has a text and its mask (which may be None)."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context,
        attention_mask: T, image_rotary_emb: Any = None, *, temb: T = None,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb,
                        image_rotary_emb, ip_hidden_states, ip_adapter_masks)


class StableAudioCall(Processor):
    """Self or cross attention of Stable Audio."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context = None,
        attention_mask: T = None, rotary_emb: Any = None, *, temb: T = None,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb,
                        rotary_emb, ip_hidden_states, ip_adapter_masks)


class LuminaCall(Processor):
    """Self or cross attention with a rotary table each for queries and keys."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Context,
        attention_mask: T = None, query_rotary_emb: T = None, key_rotary_emb: T = None,
        base_sequence_length: int | None = None, *, temb: T = None,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Tensor:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb,
                        query_rotary_emb, ip_hidden_states, ip_adapter_masks,
                        key_rope=key_rotary_emb, base_length=base_sequence_length)


class GridCall(Processor):
    """Attention of a grid to itself."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, *,
        ip_hidden_states: Any = None, ip_adapter_masks: Any = None,
    ) -> Tensor:
        return self.run(attn, hidden_states, states=ip_hidden_states, masks=ip_adapter_masks)
# fmt: on
