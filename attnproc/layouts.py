"""Which projections make queries, keys and values of which stream.

Every layout gives `Streams` of ``[B, S, H*D]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused_grid import mixed, scaled
from .linears import called
from .types import QKV, ProjectPart, Site, Streams

__all__ = [
    "added_kv",
    "joint",
    "joint_packed",
    "multiscale",
    "packed",
    "separate",
    "shared",
    "shared_packed",
]

SELF = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def separate(at: Site, x: Tensor, context: Tensor | None) -> Streams:
    """Queries of the input; keys and values of the context, or of the input without one."""
    return Streams(_three(at, x, x if context is None else context))


def packed(at: Site, x: Tensor, context: Tensor | None) -> Streams:
    """As `separate`, by one product (two with a context) once the module is fused."""
    if context is None and _is_packed(at, "to_qkv"):
        return Streams(QKV(*_split(at, "to_qkv", SELF, x)))
    if context is not None and _is_packed(at, "to_kv"):
        return Streams(QKV(at.linear("to_q", x), *_split(at, "to_kv", SELF[1:], context)))
    return separate(at, x, context)


def joint(at: Site, x: Tensor, context: Tensor | None) -> Streams:
    """Each stream by its own projections."""
    image = _three(at, x, x)
    return Streams(image, None if context is None else _added(at, context))


def joint_packed(at: Site, x: Tensor, context: Tensor | None) -> Streams:
    """As `joint`, by one product a stream once the module is fused."""
    if not _is_packed(at, "to_qkv"):
        return joint(at, x, context)
    image = QKV(*_split(at, "to_qkv", SELF, x))
    return Streams(image, context if context is None else _text(at, context))


def shared(at: Site, x: Tensor, context: Tensor | None) -> Streams:
    """Both streams by the same projections."""
    return _both(separate, at, x, context)


def shared_packed(at: Site, x: Tensor, context: Tensor | None) -> Streams:
    """As `shared`, by one product a stream once the module is fused."""
    return _both(packed, at, x, context)


def added_kv(at: Site, x: Tensor, context: Tensor | None) -> Streams:
    """The text adds keys and values to the image's, or stands in for them."""
    text = _pair(at, x if context is None else context)
    if at.attn.only_cross_attention:
        return Streams(QKV(at.linear("to_q", x), None, None), text)
    return Streams(_all(at, x), text)


def multiscale(at: Site, x: Tensor, context: Tensor | None) -> Streams:
    """DC-AE: heads of the grid ``[B, C, height, width]`` and of its convolved copies."""
    tokens = scaled(at, SELF, x)
    if tokens is None:
        grid = x.movedim(1, -1)
        qkv = torch.cat(at.products(SELF, grid), dim=-1).movedim(-1, 1)
        scales = torch.cat(
            [qkv, *(mixed(block, qkv) for block in at.attn.to_qkv_multiscale)], dim=1
        )
        tokens = scales.flatten(2).transpose(1, 2)
    heads = tokens.view(*tokens.shape[:2], -1, 3, at.attn.attention_head_dim)
    return Streams(QKV(*heads.unbind(3)))  # each [B, S, H, D]


# Names as defaults, since compiled code checks every string of a variable.
def _all(at: Site, x: Tensor, names: tuple[str, ...] = SELF) -> QKV:
    return QKV(*at.products(names, x))


def _pair(at: Site, context: Tensor, names: tuple[str, ...] = ADDED[1:]) -> QKV:
    return QKV(None, *at.products(names, context))


def _three(at: Site, x: Tensor, context: Tensor, names: tuple[str, ...] = SELF) -> QKV:
    if x is context and (at.recipe.around or at.recipe.edits):
        asked = _asked(at, x)
        if asked < x.shape[0]:
            q, k = at.products(names[:2], x[:asked])
            return QKV(q, k, at.linear(names[2], x))
        context = _shown(at, x)
    if x is context:
        return _all(at, x, names)
    return QKV(at.linear(names[0], x), *at.products(names[1:], context))


def _added(at: Site, context: Tensor, names: tuple[str, ...] = ADDED) -> QKV:
    return _three(at, context, context, names)


def _asked(at: Site, x: Tensor) -> int:
    """Of how many rows of the batch queries and keys matter: not of those that pass values on.

    Only where nothing else looks at them, and nothing else comes a row.
    """
    around = at.recipe.around
    asked = getattr(around[0], "asked", None) if len(around) == 1 else None
    if asked is None or at.recipe.edits or not _by_rows_alone(at):
        return x.shape[0]
    return asked(x.shape[0])


def _shown(at: Site, x: Tensor) -> Tensor:
    """The rows of the batch whose keys and values an edit shows to all; all, where none does."""
    edits = at.recipe.edits
    shown = getattr(edits[0], "shown", None) if len(edits) == 1 else None
    if shown is None or at.recipe.around or not _by_rows_alone(at):
        return x
    rows = shown(x.shape[0])
    return x if rows == slice(None) else x[rows]


def _by_rows_alone(at: Site) -> bool:
    """Whether one part alone looks at rows of the batch, and nothing else comes a row."""
    call = at.call
    rope = call.rope if isinstance(call.rope, tuple) else (call.rope,)
    plain = all(part is None or (isinstance(part, Tensor) and part.ndim == 2) for part in rope)
    spread = at.proc._parallel_config is not None  # pyright: ignore[reportPrivateUsage]
    return plain and call.context is None and not (at.recipe.prompts or spread)


def _both(layout: ProjectPart, at: Site, x: Tensor, context: Tensor | None) -> Streams:
    if context is None:
        return Streams(layout(at, x, None).image)
    # A CPU reads all weights for a second product too, and joins the streams by a copy anyway.
    if x.is_cpu and context.dtype == x.dtype and context.shape[::2] == x.shape[::2]:
        tokens, both = context.shape[1], layout(at, torch.cat((context, x), dim=1), None).image
        return Streams(both.tokens(slice(tokens, None)), both.tokens(slice(tokens)))
    return Streams(layout(at, x, None).image, layout(at, context, None).image)


def _is_packed(at: Site, layer: str) -> bool:
    return at.setting("fused_projections", False) and at.held(layer) is not None


def _text(at: Site, context: Tensor) -> QKV:
    if _is_packed(at, "to_added_qkv"):
        return QKV(*_split(at, "to_added_qkv", ADDED, context))
    return _added(at, context)


def _split(at: Site, layer: str, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
    """The parts of one product, each with the adapters of its name."""
    widths = [at.held(name).out_features for name in names]
    parts = called(at.held(layer), x, at.compiling).split(widths, dim=-1)
    return [at.linear(name, x, part) for name, part in zip(names, parts, strict=True)]
