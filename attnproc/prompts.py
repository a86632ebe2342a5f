"""Image prompts: attention to image tokens beside the text, added to the image stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import RMSNorm
from .shapes import merge_heads
from .types import Arranged, KernelCall, Scoring, Site

if TYPE_CHECKING:
    from .processor import Processor

__all__ = ["decoupled", "joint_decoupled", "mount_joint_prompt", "mount_prompts", "region"]

Scale = float | Tensor | Sequence[float | Tensor]


def mount_prompts(
    proc: Processor,
    hidden_size: int,
    cross_attention_dim: int | None,
    num_tokens: int | Sequence[int],
    scale: Scale,
    *,
    bias: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Gives `proc` one pair of projections `to_k_ip.{i}`, `to_v_ip.{i}` for each image prompt.

    Raises:
        ValueError: `scale` is a list of another length than `num_tokens`.
    """
    num_tokens = num_tokens if isinstance(num_tokens, tuple | list) else [num_tokens]
    scale = scale if isinstance(scale, list) else [scale] * len(num_tokens)
    if len(scale) != len(num_tokens):
        raise ValueError(
            f"scale has {len(scale)} entries for {len(num_tokens)} image prompts (num_tokens="
            f"{tuple(num_tokens)}): give one number, or a list with one entry a prompt"
        )
    proc.hidden_size, proc.cross_attention_dim = hidden_size, cross_attention_dim
    proc.num_tokens, proc.scale = num_tokens, scale
    for name in ("to_k_ip", "to_v_ip"):
        layers = (
            nn.Linear(
                cross_attention_dim or hidden_size, hidden_size, bias, device=device, dtype=dtype
            )
            for _ in num_tokens
        )
        setattr(proc, name, nn.ModuleList(layers))


def decoupled(at: Site, arranged: Arranged, kernel: KernelCall) -> Tensor | None:
    """One attention from the image's queries to each image prompt, weighted and summed.

    The prompts' states are ``[B, tokens, C]`` or ``[B, images, tokens, C]``; a mask of a prompt is
    ``[1, images, height, width]``. Source: https://arxiv.org/abs/2308.06721
    """
    proc, states = at.proc, at.call.ip_states
    if states is None:
        return None
    scales, masks = _checked(states, proc.scale, at.call.ip_masks)

    q = arranged.query.transpose(1, 2)  # [B, H, S, D]
    scoring = Scoring(scale=at.recipe.scale(at))
    total = None
    for i, (state, scale, mask) in enumerate(zip(states, scales, masks, strict=True)):
        if _is_off(scale):
            continue
        for tokens, weight in _images(state, scale, mask, q):
            k, v = (_keys(layers[i], tokens, q) for layers in (proc.to_k_ip, proc.to_v_ip))
            more = weight * merge_heads(kernel(q, k, v, scoring))
            total = more if total is None else total + more
    return torch.zeros_like(arranged.query.flatten(2)) if total is None else total


def _images(
    state: Tensor, scale: Scale, mask: Tensor | None, q: Tensor
) -> list[tuple[Tensor, float | Tensor]]:
    """Tokens ``[B, tokens, C]`` and weight of each image that has a softmax of its own."""
    if mask is None:
        return [(state.flatten(1, -2), scale)]
    count = mask.shape[1]
    scale = scale if isinstance(scale, list) else [scale] * count
    return [(state[:, i], scale[i] * region(mask[:, i], q.shape[2]).to(q)) for i in range(count)]


def _keys(layer: nn.Module, tokens: Tensor, q: Tensor) -> Tensor:
    return layer(tokens).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2).to(q.dtype)


def _is_off(scale: Scale) -> bool:
    """Whether a scale is zero by its plain numbers; a tensor is never looked into."""
    if isinstance(scale, list | tuple):
        return all(_is_off(s) for s in scale)
    return not isinstance(scale, Tensor) and scale == 0


def _checked(
    states: Sequence[Tensor], scales: list[Scale], masks: Sequence[Tensor | None] | Tensor | None
) -> tuple[list[Scale], Sequence[Tensor | None]]:
    if len(states) != len(scales):
        raise ValueError(
            f"ip_hidden_states has {len(states)} image prompts, this processor holds {len(scales)}"
        )
    if masks is None:
        return scales, [None] * len(scales)
    masks = list(masks.unsqueeze(1)) if isinstance(masks, Tensor) else masks
    if len(masks) != len(scales):
        raise ValueError(
            f"ip_adapter_masks has {len(masks)} entries for {len(scales)} image prompts: "
            "give one mask (or None) a prompt"
        )
    for i, (state, scale, mask) in enumerate(zip(states, scales, masks, strict=True)):
        if mask is not None:
            _check_mask(i, state, scale, mask)
    return scales, masks


def _check_mask(index: int, state: Tensor, scale: Scale, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"ip_adapter_masks[{index}] is {got}: give a tensor [1, images, height, width]"
        )
    images = state.shape[1] if state.ndim == 4 else None
    if mask.shape[1] != images:
        raise ValueError(
            f"ip_adapter_masks[{index}] is for {mask.shape[1]} images, its states are "
            f"{list(state.shape)}: [B, images, tokens, C] with as many images"
        )
    if isinstance(scale, list) and len(scale) != mask.shape[1]:
        raise ValueError(
            f"scale[{index}] has {len(scale)} entries for {mask.shape[1]} masked images"
        )


def region(mask: Tensor, tokens: int) -> Tensor:
    """A mask ``[B|1, height, width]`` as weights ``[B|1, tokens, 1]`` of its picture's tokens.

    The token grid has the mask's aspect ratio as nearly as whole numbers allow; where it does not
    come out, missing tokens get 0 and tokens too many are dropped.
    """
    height, width = mask.shape[-2:]
    rows = int(math.sqrt(tokens * height / width))
    rows += tokens % rows != 0
    grid = F.interpolate(mask[None], size=(rows, tokens // rows), mode="bicubic")[0].flatten(1)
    return F.pad(grid, (0, max(0, tokens - grid.shape[1])))[:, :tokens, None]


class PromptNorm(nn.Module):
    """Layer norm of image states, shifted and scaled by the timestep embedding (SD3)."""

    def __init__(self, temb_dim: int, states_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(temb_dim, 2 * states_dim)
        self.norm = nn.LayerNorm(states_dim, 1e-6, elementwise_affine=False)

    def forward(self, states: Tensor, temb: Tensor) -> Tensor:
        """Norms ``[B, tokens, C]`` by `temb` ``[B, C']``."""
        shift, scale = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        return self.norm(states) * (1 + scale) + shift


def mount_joint_prompt(
    proc: Processor, hidden_size: int, states_dim: int, head_dim: int, temb_dim: int, scale: float
) -> None:
    """Gives `proc` the norms and projections of SD3's image prompt."""
    proc.norm_ip = PromptNorm(temb_dim, states_dim)
    proc.to_k_ip = nn.Linear(states_dim, hidden_size, bias=False)
    proc.to_v_ip = nn.Linear(states_dim, hidden_size, bias=False)
    for name in ("norm_q", "norm_k", "norm_ip_k"):
        setattr(proc, name, RMSNorm(head_dim, 1e-6))
    proc.scale = scale


def joint_decoupled(at: Site, arranged: Arranged, kernel: KernelCall) -> Tensor | None:
    """Attention of the image to itself and to the prompt, under norms of its own (SD3).

    The prompt's states are ``[B, tokens, C]``; `temb` ``[B, C']`` steers their norm.
    """
    proc, states = at.proc, at.call.ip_states
    if states is None or _is_off(proc.scale):
        return None
    if at.call.temb is None:
        raise ValueError("temb is None: the image prompt's norm needs the timestep embedding")

    normed = proc.norm_ip(states, at.call.temb)
    q = proc.norm_q(arranged.raw.q.transpose(1, 2))  # [B, H, S, D]
    k = proc.norm_k(arranged.raw.k.transpose(1, 2))
    more_k, more_v = (_keys(layer, normed, q) for layer in (proc.to_k_ip, proc.to_v_ip))

    k = torch.cat((k, proc.norm_ip_k(more_k)), dim=2)
    v = torch.cat((arranged.raw.v.transpose(1, 2), more_v), dim=2)
    return proc.scale * merge_heads(kernel(q, k, v, Scoring(scale=at.recipe.scale(at))))
