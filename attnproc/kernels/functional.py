"""Attention as a function, by the same choice of kernels as the processors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ..masks import Room, fold
from ..types import MaskKind, Scoring
from .choice import resolved
from .plan import AUTO, lse_of
from .scope import Scope, check_fallback, scope

__all__ = ["attention", "scoring_of"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | MaskKind | None = None,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    dropout: float = 0.0,
    backend: Any = None,
    fallback: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q ``[B, H, Q, D]`` to k and v ``[B, H', K, D]``, H' dividing H.

    Args:
        q: Queries.
        k: Keys.
        v: Values, whose D may differ.
        mask: A mask kind, or a tensor ``[B, K]``, ``[B, Q|1, K]`` or ``[B|1, H|1, Q|1, K]``: bool
            means "attend", float is added to the scores. Queries without any key give zeros.
        causal: Query i sees keys 0 to i.
        scale: Factor of the scores; None is ``D ** -0.5``.
        dropout: Probability by which a weight is dropped.
        backend: A kernel's name; None is the block's (`attnproc.backend`), else automatic.
        fallback: `"warn"` runs the automatic choice where the named kernel does not take the call.
        return_lse: Give the log-sum-exp of the scores ``[B, H, Q]`` too; -inf without any key.

    Returns:
        The output ``[B, H, Q, D]``, in the dtype of `q`.

    Raises:
        ValueError: The mask does not fit, or the named kernel does not take the call.
    """
    check_fallback(fallback)
    scoring = scoring_of(q, k, mask, causal=causal, scale=scale, dropout=dropout)
    wish = scope(is_compiling()) if backend is None else Scope(backend, fallback)
    if wish is None:
        return lse_of(AUTO, q, k, v, scoring) if return_lse else AUTO(q, k, v, scoring)
    return resolved(wish, lse=return_lse)(q, k, v, scoring)


def scoring_of(q: Tensor, k: Tensor, mask: Tensor | MaskKind | None, **settings: Any) -> Scoring:
    """The scoring that a mask and settings amount to.

    Raises:
        ValueError: The mask does not fit, or the heads of keys do not divide those of queries.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which do not divide the {q.shape[1]} of q")
    scoring = Scoring(**settings)
    room = Room((q.shape[0],), q.shape[1], q.shape[2], k.shape[2])
    return scoring if mask is None else fold(mask, scoring, room)
