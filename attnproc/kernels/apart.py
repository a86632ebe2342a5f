"""Keys that a mask may hide, apart from those that it never does: two calls, merged exactly.

A mask takes torch's kernels off their fast path. In a joint sequence only the text has padding, a
hundredth of the keys, so the image's keys go without a mask, and the outputs of both are weighted
by their log-sum-exps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Keys, Scoring
from . import triton
from .fusing import fusable, keeps_nothing
from .lse import gives_lse, with_lse

__all__ = ["apart", "worth_parting"]

# Keys without a mask, for each that has one, from which on two calls are faster.
_MORE = 8


def worth_parting(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether a mask leaves most keys alone, on a device whose fast kernels take none."""
    mask = scoring.mask
    if not isinstance(mask, Keys) or mask.within is None or not q.is_cuda:
        return False
    start, stop = mask.within
    few = (stop - start) * _MORE <= k.shape[2]
    return few and gives_lse(q, k, v, scoring.but(mask=None))


def apart(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor | None:
    """Attention ``[B, H, Q, D]`` under a key mask with `within`; None where torch can't."""
    mask = scoring.mask
    if not isinstance(mask, Keys) or mask.within is None:
        return None
    start, stop = mask.within
    hidden = slice(start, stop)
    rest = slice(stop, None) if start == 0 else slice(0, start)
    scoring = scoring.but(mask=None)
    some_k, some_v = k[:, :, hidden], v[:, :, hidden]

    # Finite: with nothing to see the weight below comes out as zero all the same.
    bias = torch.zeros_like(mask.valid[:, hidden], dtype=q.dtype)
    bias = bias.masked_fill(~mask.valid[:, hidden], torch.finfo(q.dtype).min / 2)
    bias = bias[:, None, None].expand(*q.shape[:3], -1)
    some = with_lse(q, some_k, some_v, scoring, bias)
    if some is None:
        return None
    most = with_lse(q, k[:, :, rest], v[:, :, rest], scoring)
    if most is None:
        return None
    (o, lse), (more, more_lse) = most, some
    if keeps_nothing() and fusable(o):
        return triton.merge.merge(o, lse, more, more_lse, o.dtype)[0]
    weight = torch.sigmoid(more_lse - lse).unsqueeze(-1)
    return torch.lerp(o, more, weight.to(o.dtype))
