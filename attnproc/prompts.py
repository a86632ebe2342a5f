"""Image prompts: attention to image tokens beside the text, added to the image stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .fused_prompts import attended, attended_beside
from .linears import called
from .modules import RMSNorm
from .norms import Norms
from .prologue import laid
from .schedules import amount, is_off
from .shapes import heads_first, merge_heads
from .types import QKV, Arranged, Branch, KernelCall, Scoring, Site, Streams

__all__ = [
    "decoupled",
    "joint_decoupled",
    "mount_joint_prompt",
    "mount_prompts",
    "region",
    "with_prompts",
]

Scale = Any
"""A `Weight`, or a list with one a prompt, which may be a list with one a masked image."""


def mount_prompts(
    proc: Any,
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
    tokens = [num_tokens] if isinstance(num_tokens, int) else num_tokens
    scales: list[Any] = scale if isinstance(scale, list) else [scale] * len(tokens)
    if len(scales) != len(tokens):
        raise ValueError(
            f"scale has {len(scales)} entries for {len(tokens)} image prompts (num_tokens="
            f"{tuple(tokens)}): give one number, or a list with one entry a prompt"
        )
    proc.hidden_size, proc.cross_attention_dim = hidden_size, cross_attention_dim
    proc.num_tokens, proc.scale = tokens, scales
    for name in ("to_k_ip", "to_v_ip"):
        layers = (
            nn.Linear(
                cross_attention_dim or hidden_size, hidden_size, bias, device=device, dtype=dtype
            )
            for _ in tokens
        )
        setattr(proc, name, nn.ModuleList(layers))


def decoupled(at: Site, arranged: Arranged, kernel: KernelCall) -> Tensor | list[Branch] | None:
    """One attention from the image's queries to each image prompt, weighted and summed.

    Where the attention's own queries are those, they are left to `with_prompts`.

    The prompts' states are ``[B, tokens, C]`` or ``[B, images, tokens, C]``; a mask of a prompt is
    ``[1, images, height, width]``. Source: https://arxiv.org/abs/2308.06721
    """
    proc, states = at.proc, at.call.ip_states
    if states is None:
        return None
    scales, masks = _checked(states, proc.scale, at.call.ip_masks)

    q = _queries(at, arranged)
    keys, values = proc.to_k_ip._modules, proc.to_v_ip._modules
    branches: list[Branch] = []
    for i, (state, scale, mask) in enumerate(zip(states, scales, masks, strict=True)):
        if not is_off(scale):
            layers = keys[str(i)], values[str(i)]
            branches += _branches(at, layers, state, scale, mask, q)

    if q is arranged.q and _goes_along(at):
        return branches
    total = _summed(branches, q, kernel, Scoring(scale=at.recipe.scale(at)))
    if total is None:
        return q.new_zeros(()).expand(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
    return total


def with_prompts(
    prompts: Sequence[Branch],
    kernel: KernelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
) -> Tensor:
    """Attention ``[B, H, Q, D]`` plus what the same queries see of image prompts.

    By one launch where a fused kernel takes both.

    Args:
        prompts: Keys and values ``[B, tokens, H*D]`` and a weight.
        kernel: What computes attention.
        q: ``[B, H, Q, D]``.
        k: ``[B, H', K, D]``.
        v: As `k`.
        scoring: Masks and scale; a mask is for `k` alone.
    """
    total = attended_beside(prompts, q, k, v, kernel, scoring)
    if total is not None:
        return heads_first(total, q.shape[3])
    total = _summed(prompts, q, kernel, Scoring(scale=scoring.scale))
    o = kernel(q, k, v, scoring)
    return o if total is None else o + heads_first(total, q.shape[3])


def _queries(at: Site, arranged: Arranged) -> Tensor:
    """The image's queries ``[B, H, S, D]``, normed but not rotated."""
    if arranged.raw is None:
        return arranged.q
    q, norm_q = arranged.raw.q, at.recipe.norm(at, False).image[0]
    if norm_q is not None:
        q = laid(Streams(QKV(q, None, None)), Norms((norm_q, None))).q
    return q.transpose(1, 2)


def _goes_along(at: Site) -> bool:
    """Whether prompts may be added where attention is computed, as nothing comes in between."""
    # Compiled code has no `not` for a tuple of objects.
    if at.recipe.edits or at.recipe.around:
        return False
    return at.proc._parallel_config is None  # pyright: ignore[reportPrivateUsage]


def _summed(
    branches: Sequence[Branch],
    q: Tensor,
    kernel: KernelCall,
    scoring: Scoring,
) -> Tensor | None:
    """The weighted sum ``[B, S, H*D]`` of attention to each branch; None without any."""
    total = attended(branches, q, kernel, scoring)
    return _composed(branches, q, kernel, scoring) if total is None else total


def _branches(
    at: Site,
    layers: tuple[nn.Module, nn.Module],
    state: Tensor,
    scale: Scale,
    mask: Tensor | None,
    q: Tensor,
) -> list[Branch]:
    """One branch for a prompt; with a mask one for each of its images."""
    if mask is None:
        tokens = state.flatten(1, -2)
        k, v = _keys(at, layers[0], tokens, q), _keys(at, layers[1], tokens, q)
        return [(k, v, amount(scale))]
    k, v = (_keys(at, layer, state, q).unbind(1) for layer in layers)
    scales = scale if isinstance(scale, list | tuple) else [scale] * len(k)
    weights = (amount(s) * r for s, r in zip(scales, _regions(mask, q), strict=True))
    return list(zip(k, v, weights, strict=True))


def _keys(at: Site, layer: nn.Module, tokens: Tensor, q: Tensor) -> Tensor:
    """``[..., tokens, H*D]`` of states ``[..., tokens, C]``, in the dtype of the queries."""
    found = called(layer, tokens, at.compiling)
    return found if found.dtype == q.dtype else found.to(q.dtype)


def _composed(
    branches: Sequence[Branch], q: Tensor, kernel: KernelCall, scoring: Scoring
) -> Tensor | None:
    """The weighted sum by a call of the kernel for branches with equally many tokens."""
    groups: dict[int, list[Branch]] = {}
    for k, v, weight in branches:
        branch = heads_first(k, q.shape[3]), heads_first(v, q.shape[3]), weight
        groups.setdefault(k.shape[1], []).append(branch)
    total = None
    for alike in groups.values():
        total = _added(total, alike, q, kernel, scoring)
    return total


def _added(
    total: Tensor | None,
    branches: list[Branch],
    q: Tensor,
    kernel: KernelCall,
    scoring: Scoring,
) -> Tensor:
    """What there is plus the weighted sum of branches with equally many tokens, by one call.

    Their heads are split, ``[B, H, tokens, D]``.
    """
    if len(branches) > 1:
        many = q.expand(len(branches), *q.shape).flatten(0, 1)
        k, v, weights = zip(*branches, strict=True)
        o = merge_heads(kernel(many, torch.cat(k), torch.cat(v), scoring)).chunk(len(branches))
        more = torch.stack([w * part for w, part in zip(weights, o, strict=True)]).sum(dim=0)
        return more if total is None else total + more
    k, v, weight = branches[0]
    if isinstance(weight, Tensor):
        more = weight * merge_heads(kernel(q, k, v, scoring))
        return more if total is None else total + more
    if total is None:
        # A number weights the prompt's few values instead of all outputs.
        return merge_heads(kernel(q, k, v if weight == 1 else v * weight, scoring))
    return torch.add(total, merge_heads(kernel(q, k, v, scoring)), alpha=weight)


def _checked(
    states: Sequence[Tensor] | Tensor,
    scales: list[Any],
    masks: Sequence[Tensor | None] | Tensor | None,
) -> tuple[list[Any], Sequence[Tensor | None]]:
    if len(states) != len(scales):
        raise ValueError(
            f"ip_hidden_states has {len(states)} image prompts, this processor holds {len(scales)}"
        )
    if masks is None:
        masks = [None] * len(scales)
    masks = list(masks.unsqueeze(1)) if isinstance(masks, Tensor) else masks
    if len(masks) != len(scales):
        raise ValueError(
            f"ip_adapter_masks has {len(masks)} entries for {len(scales)} image prompts: "
            "give one mask (or None) a prompt"
        )
    for i, (state, scale, mask) in enumerate(zip(states, scales, masks, strict=True)):
        if mask is not None:
            _check_mask(i, state, scale, mask)
        elif isinstance(scale, list | tuple):
            raise ValueError(
                f"scale[{i}] is a list, one entry a masked image, but ip_adapter_masks has no "
                "mask for that prompt: give the mask or one number"
            )
    return scales, masks


def _check_mask(index: int, state: Tensor, scale: Scale, mask: Any) -> None:
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
    if isinstance(scale, list | tuple) and len(scale) != mask.shape[1]:
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


# Resized masks by the mask they came from, so that all layers of a resolution share one.
_REGIONS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _regions(mask: Tensor, q: Tensor) -> Tensor:
    """The weights ``[images, 1, S, 1]`` of a mask ``[1, images, height, width]``."""
    if torch.compiler.is_compiling() or mask.requires_grad:
        return region(mask[0], q.shape[2])[:, None].to(q)
    sizes: dict[Any, Tensor] = _REGIONS.setdefault(mask, {})  # pyright: ignore
    key = (mask._version, q.shape[2], q.dtype, q.device)
    if key not in sizes:
        sizes[key] = region(mask[0], q.shape[2])[:, None].to(q)
    return sizes[key]


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
    proc: Any, hidden_size: int, states_dim: int, head_dim: int, temb_dim: int, scale: Scale
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

    The prompt's states are ``[B, tokens, C]``; `temb` ``[B, C']`` steers their norm; a mask is
    ``[1, 1, height, width]``.
    """
    proc, states = at.proc, at.call.ip_states
    if states is None or is_off(proc.scale):
        return None
    if at.call.temb is None:
        raise ValueError("temb is None: the image prompt's norm needs the timestep embedding")

    normed = proc.norm_ip(states, temb=at.call.temb)
    raw = arranged.raw
    if raw is None:
        raw = QKV(*(x.transpose(1, 2) for x in (arranged.q, arranged.k, arranged.v)))
    k = called(proc.to_k_ip, normed, at.compiling)
    v = called(proc.to_v_ip, normed, at.compiling)
    prompt = QKV(None, k.to(raw.k.dtype), v.to(raw.v.dtype))
    prompt.split(raw.k.shape[3])
    norms = Norms((proc.norm_q, proc.norm_k), (None, proc.norm_ip_k))
    both = laid(Streams(QKV(raw.q, raw.k, raw.v), prompt), norms)
    q, k, v = both.q.transpose(1, 2), both.k.transpose(1, 2), both.v.transpose(1, 2)
    # The prompt's keys stand behind the image's as a text's would.
    scoring = Scoring(scale=at.recipe.scale(at), image_keys=(0, raw.k.shape[1]))
    mask = _only_mask(at.call.ip_masks)
    region = None if mask is None else _regions(mask, q)[0]
    o = merge_heads(kernel(q, k, v, scoring))
    # What is scaled is as large as each of them.
    del both, q, k, v
    o = amount(proc.scale) * o
    return o if region is None else o * region


def _only_mask(masks: Sequence[Tensor | None] | Tensor | None) -> Tensor | None:
    if masks is None:
        return None
    mask = masks if isinstance(masks, Tensor) else masks[0]
    if len(masks) != 1 or (mask is not None and (mask.ndim != 4 or mask.shape[1] != 1)):
        raise ValueError(
            f"ip_adapter_masks: this processor has one image prompt, so give one mask "
            f"[1, 1, height, width]; got {len(masks)}"
        )
    return mask
