"""The call's mask as a mask kind: bool means "attend", float is added to the scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Arranged, Bias, Keys, Mask, Scoring, Site

__all__ = ["factors", "padded", "truthy", "unmasked", "valid_text"]


def padded(at: Site, arranged: Arranged, scoring: Scoring) -> Scoring:
    """A mask over all keys, or over the text keys of a joint sequence (the image stays visible).

    Takes ``[B, K]``, ``[B, Q|1, K]``, ``[B*H, Q|1, K]`` and ``[B|1, H|1, Q|1, K]``.
    """
    mask = at.call.mask
    if mask is None:
        return scoring
    mask = _over_all_keys(mask, arranged, at.recipe.text_first)
    return scoring._replace(mask=_kind(at, mask, arranged))


def truthy(at: Site, arranged: Arranged, scoring: Scoring) -> Scoring:
    """A key mask of any dtype: what is not zero may be attended to (Lumina)."""
    if at.call.mask is None:
        return scoring
    valid = at.call.mask.bool().flatten(1)
    return scoring._replace(mask=_kind(at, valid, arranged))


def valid_text(at: Site, arranged: Arranged, scoring: Scoring) -> Scoring:
    """A mask ``[B, T]`` over the text: its padding neither attends nor is attended to (Mochi)."""
    if at.call.mask is None:
        return scoring
    valid = _over_all_keys(at.call.mask.bool(), arranged, at.recipe.text_first)
    return scoring._replace(mask=_kind(at, valid, arranged), keep=valid)


def unmasked(at: Site, arranged: Arranged, scoring: Scoring) -> Scoring:
    """No mask; the module's `eps` guards the normaliser (DC-AE)."""
    return scoring._replace(eps=at.attn.eps)


def factors(mask: Mask | None, dtype: torch.dtype) -> Tensor | None:
    """A mask over keys as factors ``[B|1, H|1, 1, K]`` for attention without a softmax.

    Raises:
        ValueError: The mask differs between queries, which linear attention can't honour.
    """
    if mask is None:
        return None
    if isinstance(mask, Keys):
        return mask.valid[:, None, None].to(dtype)
    if mask.values.shape[2] != 1:
        raise ValueError(
            f"attention_mask is {list(mask.values.shape)} with one row a query: linear attention "
            "takes a mask over keys, [B, K] or [B|1, H|1, 1, K]"
        )
    return (
        mask.values.to(dtype) if mask.values.dtype == torch.bool else mask.values.to(dtype).exp()
    )


def _over_all_keys(mask: Tensor, arranged: Arranged, text_first: bool) -> Tensor:
    length, keys, text = mask.shape[-1], arranged.k.shape[2], arranged.text_keys
    if length == keys:
        return mask
    if length != text:
        options = f"{keys} (all keys)" + (f" or {text} (the text keys)" if text else "")
        raise ValueError(f"attention_mask ends in {length} keys, this call has {options}")
    image = (0, keys - text) if text_first else (keys - text, 0)
    return F.pad(mask, image, value=mask.dtype == torch.bool)


def _kind(at: Site, mask: Tensor, arranged: Arranged) -> Mask:
    batch, heads, queries = arranged.q.shape[:3]
    # Guidance by perturbation may be given the mask of the unperturbed rows alone.
    batches = [batch, *(w.plain(batch) for w in at.recipe.around if hasattr(w, "plain"))]
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask is {mask.dtype}: give bool (true means attend) or float (added to "
            "the scores)"
        )
    shape = list(mask.shape)
    if mask.ndim == 3:
        stacked = heads > 1 and mask.shape[0] in [rows * heads for rows in batches]
        mask = mask.unflatten(0, (-1, heads)) if stacked else mask[:, None]
    elif mask.ndim == 2:
        mask = mask[:, None, None]
    if mask.ndim != 4 or not any(_fits(mask, (rows, heads, queries)) for rows in batches):
        raise ValueError(
            f"attention_mask is {shape}, which does not broadcast to "
            f"[{batch}, {heads}, {queries}, {arranged.k.shape[2]}] (batch, heads, queries, keys)"
        )
    over_keys = mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1
    return Keys(mask[:, 0, 0]) if over_keys else Bias(mask)


def _fits(mask: Tensor, target: tuple[int, int, int]) -> bool:
    return all(n in (1, full) for n, full in zip(mask.shape, target, strict=False))
