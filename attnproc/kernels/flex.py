"""FlexAttention, compiled: what positions hide costs nothing, other masks change the scores.

A block mask is made of positions alone and kept for the next call; keys and biases, whose values
change from call to call, go into the scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..types import Keys, Mask, MaskMod, Scoring
from .base import Kernel
from .takes import HALF, Ask, Takes
from .visible import limits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["FLEX", "flex", "flex_lse"]

# Every shape and mask is a compilation of its own.
_COMPILATIONS = 512


def flex(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`torch.nn.attention.flex_attention.flex_attention`, never uncompiled."""
    return _run(q, k, v, scoring)


def flex_lse(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """`flex` and the log-sum-exp of its scores ``[B, H, Q]``."""
    from torch.nn.attention.flex_attention import AuxRequest

    o, aux = _run(q, k, v, scoring, return_aux=AuxRequest(lse=True))
    return o, aux.lse


def _run(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, **options: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    q, scale = scoring.scaled(q)
    rule = (*limits(scoring), scoring.mods)
    arguments: dict[str, Any] = {
        "score_mod": None if scoring.mask is None else _score_mod(scoring.mask),
        "block_mask": None if rule == (None, None, ()) else _blocks(rule, q, k),
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        **options,
    }
    if torch.compiler.is_compiling():
        attend: Any = flex_attention
        return attend(q, k, v, **arguments)
    config: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
    with config.patch(recompile_limit=_COMPILATIONS):
        return _compiled()(q, k, v, **arguments)


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _score_mod(mask: Mask) -> Callable[..., Tensor]:
    """What a mask of values makes of a score."""
    table = mask.valid[:, None, None] if isinstance(mask, Keys) else mask.values
    # Along an axis of one the same entry serves all.
    x, y, z = (int(n > 1) for n in table.shape[:3])

    def added(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[b * x, h * y, i * z, j]

    def hidden(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(table[b * x, h * y, i * z, j], score, -torch.inf)

    return hidden if table.dtype == torch.bool else added


def _blocks(
    rule: tuple[int | None, int | None, tuple[MaskMod, ...]], q: Tensor, k: Tensor
) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    device, mods = str(q.device), rule[2]
    batch, heads = (q.shape[0], q.shape[1]) if mods else (None, None)
    if torch.compiler.is_compiling():
        mod = _mask_mod(*rule)
        return create_block_mask(mod, batch, heads, q.shape[2], k.shape[2], device)
    return _block_mask(rule, batch, heads, q.shape[2], k.shape[2], device)


@functools.lru_cache(maxsize=64)
def _block_mask(
    rule: tuple[int | None, int | None, tuple[MaskMod, ...]],
    batch: int | None,
    heads: int | None,
    queries: int,
    keys: int,
    device: str,
) -> BlockMask:
    """The blocks of positions that are seen; compiled, as it is Q x K otherwise."""
    from torch.nn.attention.flex_attention import create_block_mask

    # On a CPU its compilation costs more than what it saves.
    compiled = not device.startswith("cpu") or queries * keys > 1 << 24
    mod = _mask_mod(*rule)
    return create_block_mask(mod, batch, heads, queries, keys, device, _compile=compiled)


def _mask_mod(left: int | None, right: int | None, mods: tuple[MaskMod, ...]) -> MaskMod:
    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shown = j >= 0
        if right is not None:
            shown = shown & (j <= i + right)
        if left is not None:
            shown = shown & (j >= i - left)
        for mod in mods:
            shown = shown & mod(b, h, i, j)
        return shown

    return seen


def _also(asked: Ask) -> str | None:
    if asked.device == "cpu" and asked.backward:
        return "gradients: on a CPU it has no backward"
    if asked.device == "cpu" and asked.lse:
        return "return_lse: on a CPU it gives none"
    return None


FLEX = Kernel(
    "flex",
    flex,
    takes=Takes(
        devices=("cpu", "cuda", "xpu"),
        dtypes=(*HALF, torch.float32),
        dims=(16, 256, 1),
        lse=True,
        deterministic=False,
        also=_also,
    ),
    with_lse=flex_lse,
)
