"""SageAttention: queries and keys in 8 bits, for inference.

Tested against recorded stand-ins. It is no exact kernel: nothing picks it but its name.
Source: https://arxiv.org/abs/2411.10958
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..types import Scoring
from .base import Kernel, package
from .packed import TAKES, pack
from .reference import factor
from .takes import Takes

__all__ = ["SAGE", "sage"]

_INSTALL = "pip install sageattention (1.0.6), or build 2.2 from github.com/thu-ml/SageAttention"


def sage(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, function: str) -> Tensor:
    """A function of `sageattention`, on ``[B, H, S, D]``."""
    run = _function(function)
    return run(q, k, v, tensor_layout="HND", is_causal=scoring.causal, sm_scale=factor(q, scoring))


def sage_lse(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, function: str
) -> tuple[Tensor, Tensor]:
    """`sage` and the log-sum-exp of its scores."""
    run = _function(function)
    scale = factor(q, scoring)
    return run(
        q, k, v, tensor_layout="HND", is_causal=scoring.causal, sm_scale=scale, return_lse=True
    )


def sage_varlen(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, function: str) -> Tensor:
    """Over the keys that are no padding."""
    packed = pack(q, k, v, scoring)
    o = _function(function)(
        packed.q,
        packed.k,
        packed.v,
        packed.q_starts,
        packed.k_starts,
        *packed.lengths,
        is_causal=scoring.causal,
        sm_scale=factor(q, scoring),
    )
    return packed.output(o)


def _function(name: str) -> Any:
    module = package("sageattention", _INSTALL)
    if not hasattr(module, name):
        raise ImportError(f"this sageattention has no {name}: {_INSTALL}")
    return getattr(module, name)


def _takes(*masks: str, lse: bool) -> Takes:
    return replace(
        TAKES,
        dims=(1, 128, 1),
        masks=frozenset(masks),
        backward=False,
        lse=lse,
        traceable=False,
        exact=False,
        needs="sageattention",
        install=_INSTALL,
    )


_NAMES = {
    "sage": "sageattn",
    "sage_fp8": "sageattn_qk_int8_pv_fp8_cuda",
    "sage_fp8_sm90": "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sage_fp16": "sageattn_qk_int8_pv_fp16_cuda",
    "sage_triton": "sageattn_qk_int8_pv_fp16_triton",
}
SAGE = (
    *(
        Kernel(name, sage, (function,), takes=_takes("causal", lse=True), with_lse=sage_lse)
        for name, function in _NAMES.items()
    ),
    Kernel(
        "sage_varlen", sage_varlen, ("sageattn_varlen",), takes=_takes("keys", "causal", lse=False)
    ),
)
