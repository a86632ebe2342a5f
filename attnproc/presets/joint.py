"""Joint attention of text and image by projections of their own: SD3, AuraFlow, Mochi, Flux."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..calls import (
    AddedCall,
    AuraFlowCall,
    FluxCall,
    FluxPromptCall,
    JointPromptCall,
    MochiCall,
    PlainCall,
)
from ..frame import BARE, GRID
from ..kernels import XFORMERS, XLA
from ..kernels.around import Perturbed
from ..layouts import joint, joint_packed
from ..masks import valid_text
from ..outputs import prompt_apart, to_both
from ..processor import Holder
from ..prompts import Scale, decoupled, joint_decoupled, mount_joint_prompt, mount_prompts
from ..rotary import Rotary, pairs, per_head
from .unet import PLAIN, WithOperator, WithPartition

__all__ = [
    "AuraFlowAttnProcessor2_0",
    "FluxAttnProcessor2_0",
    "FluxIPAdapterJointAttnProcessor2_0",
    "FluxSingleAttnProcessor2_0",
    "FusedAuraFlowAttnProcessor2_0",
    "FusedFluxAttnProcessor2_0",
    "FusedJointAttnProcessor2_0",
    "JointAttnProcessor2_0",
    "MochiAttnProcessor2_0",
    "PAGCFGJointAttnProcessor2_0",
    "PAGJointAttnProcessor2_0",
    "SD3IPAdapterJointAttnProcessor2_0",
    "XFormersJointAttnProcessor",
    "XLAFluxFlashAttnProcessor2_0",
]

JOINT = PLAIN.but(frame=BARE, project=joint, output=to_both)
AURA = JOINT.but(text_first=True)
FLUX = JOINT.but(
    project=joint_packed,
    rotary=Rotary(pairs, over="joint", keys="always"),
    text_first=True,
    output=prompt_apart,
)


class JointAttnProcessor2_0(AddedCall):
    """Joint attention, image before text (Stable Diffusion 3)."""

    recipe = JOINT


class FusedJointAttnProcessor2_0(AddedCall):
    """Joint attention with one product a stream once the module is fused."""

    recipe = JOINT.but(frame=GRID, project=joint_packed)


class XFormersJointAttnProcessor(WithOperator, AddedCall):
    """Joint attention by xformers."""

    recipe = JOINT.but(kernel=XFORMERS)


class PAGJointAttnProcessor2_0(PlainCall):
    """Joint attention, perturbed in the second half of the batch."""

    recipe = JOINT.but(frame=GRID, around=(Perturbed(2),))


class PAGCFGJointAttnProcessor2_0(AddedCall):
    """Joint attention, perturbed in the last third of the batch."""

    recipe = JOINT.but(frame=GRID, around=(Perturbed(3),))


class SD3IPAdapterJointAttnProcessor2_0(JointPromptCall, Holder):
    """Joint attention plus attention to an image prompt under norms of its own.

    Args:
        hidden_size: Width of the attention layer.
        ip_hidden_states_dim: Width of the prompt's states.
        head_dim: Channels a head.
        timesteps_emb_dim: Width of `temb`.
        scale: Weight of the prompt; callers may write it at any time.
    """

    recipe = JOINT.but(prompts=(joint_decoupled,))

    def __init__(
        self,
        hidden_size: int,
        ip_hidden_states_dim: int,
        head_dim: int,
        timesteps_emb_dim: int = 1280,
        scale: float = 0.5,
    ) -> None:
        super().__init__()
        mount_joint_prompt(
            self, hidden_size, ip_hidden_states_dim, head_dim, timesteps_emb_dim, scale
        )

    @classmethod
    def settings_of(cls, other: Any) -> dict[str, Any]:
        """See `Processor.settings_of`; diffusers keeps none of them but in the weights."""
        return {
            "hidden_size": other.to_k_ip.out_features,
            "ip_hidden_states_dim": other.to_k_ip.in_features,
            "head_dim": other.norm_q.weight.shape[0],
            "timesteps_emb_dim": other.norm_ip.linear.in_features,
            "scale": other.scale,
        }


class AuraFlowAttnProcessor2_0(AuraFlowCall):
    """Joint attention, text before image (AuraFlow)."""

    recipe = AURA


class FusedAuraFlowAttnProcessor2_0(AuraFlowCall):
    """AuraFlow attention with one product a stream once the module is fused."""

    recipe = AURA.but(project=joint_packed)


class MochiAttnProcessor2_0(MochiCall):
    """Mochi joint attention; padding of the prompt neither attends nor is attended to."""

    recipe = JOINT.but(rotary=Rotary(per_head, keys="always"), mask=valid_text)


class FluxAttnProcessor2_0(FluxCall):
    """Flux attention: joint with a text; without one the result stays unprojected."""

    recipe = FLUX


class FusedFluxAttnProcessor2_0(FluxAttnProcessor2_0):
    """Flux attention; q, k, v come from one product a stream once the module is fused."""


class FluxSingleAttnProcessor2_0(FluxAttnProcessor2_0):
    """Flux attention of the single-stream blocks."""


class XLAFluxFlashAttnProcessor2_0(WithPartition, FluxCall):
    """Flux attention by torch_xla's Pallas kernel for long sequences."""

    recipe = FLUX.but(kernel=XLA)


class FluxIPAdapterJointAttnProcessor2_0(FluxPromptCall, Holder):
    """Flux attention and one attention an image prompt, returned as a third output.

    Args:
        hidden_size: Width of the attention layer.
        cross_attention_dim: Width of the prompts' states.
        num_tokens: Tokens of each prompt.
        scale: Weight of each prompt; one number for all or a list.
        device: Where the projections are made.
        dtype: Their dtype.

    Raises:
        ValueError: `scale` is a list of another length than `num_tokens`.
    """

    recipe = FLUX.but(prompts=(decoupled,))

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int,
        num_tokens: int | Sequence[int] = (4,),
        scale: Scale = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        mount_prompts(
            self,
            hidden_size,
            cross_attention_dim,
            num_tokens,
            scale,
            bias=True,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def settings_of(cls, other: Any) -> dict[str, Any]:
        """See `Processor.settings_of`; diffusers does not keep `num_tokens`."""
        known = {"num_tokens": (4,) * len(other.to_k_ip)}
        return {**known, **super().settings_of(other)}
