"""Stand-ins for packages that are not here: their attention calls, in plain torch.

`installed()` puts them where both sides import from, so that classes for xFormers, NPU and XLA
run anywhere; a package that is there is left alone. The tests' fakes, which record and refuse
besides, compute by these.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Generator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "attend",
    "flash_attention",
    "installed",
    "memory_efficient_attention",
    "npu_fusion_attention",
]


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """xformers.ops: [B*H, S, D] or [B, S, H, D], and a bias of the scores' full shape."""
    flat = query.ndim == 3
    q, k, v = (x if flat else x.transpose(1, 2) for x in (query, key, value))
    scores = (*q.shape[:-1], k.shape[-2])
    if attn_bias is not None and tuple(attn_bias.shape) != scores:
        raise ValueError(f"attn_bias is {list(attn_bias.shape)}, the scores are {list(scores)}")
    o = attend(q, k, v, attn_bias, scale, p)[0]
    return o if flat else o.transpose(1, 2)


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    **tuning: Any,
) -> tuple[Any, ...]:
    """torch_npu: BNSD; `pse` is added before the scale, True in the mask hides a key.

    Returns:
        The output, maximum and sum of the scores' exponentials, each eight times over, and four
        values that only its backward needs.
    """
    if (input_layout, head_num) != ("BNSD", query.shape[1]):
        raise ValueError(f"the stand-in knows BNSD with all heads, not {input_layout}, {head_num}")
    bias = torch.zeros(1, 1, 1, 1) if pse is None else pse.float() * scale
    if atten_mask is not None:
        bias = bias.expand(*bias.shape[:2], *atten_mask.shape[-2:])
        bias = bias.masked_fill(atten_mask.bool(), torch.finfo(torch.float32).min)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    o, scores = attend(query, key, value, bias, scale, 1 - keep_prob)
    top = scores.amax(dim=-1, keepdim=True)
    total = (scores - top).exp().sum(dim=-1, keepdim=True)
    return (o, *(t.repeat(1, 1, 1, 8) for t in (top, total)), o.new_empty(0), 0, 0, 0)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    *,
    sm_scale: float = 1.0,
    ab: Tensor | None = None,
    **placement: Any,
) -> Tensor:
    """torch_xla's Pallas kernel: BHSD, scores unscaled by default, `ab` added before the scale."""
    bias = torch.zeros(1, 1, 1, 1) if ab is None else ab.float() * sm_scale
    if causal:
        bias = bias + torch.full((q.shape[-2], k.shape[-2]), -math.inf).triu(1)
    return attend(q, k, v, bias, sm_scale)[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The output ``[..., Q, D]`` in the dtype of `v`, and the scores ``[..., Q, K]``."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT).to(accumulate) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    return F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype) @ v, scores


def _package(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    module.__version__ = "0.0.fake"  # pyright: ignore[reportAttributeAccessIssue]
    module.__dict__.update(content)
    return module


def _fakes() -> dict[str, ModuleType]:
    ops = _package("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    pallas = _package("torch_xla.experimental.custom_kernel", flash_attention=flash_attention)
    experimental = _package("torch_xla.experimental", custom_kernel=pallas)
    runtime = _package("torch_xla.runtime", is_spmd=lambda: False)
    return {
        "xformers": _package("xformers", ops=ops),
        "xformers.ops": ops,
        "torch_npu": _package("torch_npu", npu_fusion_attention=npu_fusion_attention),
        "torch_xla": _package("torch_xla", experimental=experimental, runtime=runtime),
        "torch_xla.experimental": experimental,
        "torch_xla.experimental.custom_kernel": pallas,
        "torch_xla.runtime": runtime,
    }


@contextlib.contextmanager
def installed() -> Generator[None]:
    """Within it the missing packages can be imported, and diffusers believes them there."""
    with contextlib.ExitStack() as stack:
        # diffusers looks for packages once, at its import: it must not see the stand-ins.
        theirs = None
        if importlib.util.find_spec("diffusers") is not None:
            theirs = importlib.import_module("diffusers.models.attention_processor")
        fakes = _fakes()
        missing = {n for n in fakes if "." not in n and importlib.util.find_spec(n) is None}
        for name, fake in fakes.items():
            if name.partition(".")[0] in missing:
                sys.modules[name] = fake
                stack.callback(sys.modules.pop, name, None)
        if theirs is not None:
            _persuade(theirs, missing, stack)
        yield


def _is_new(operation: str, version: str) -> bool:
    """How diffusers asks for a version of torch_xla."""
    return operation.startswith(">")


def _persuade(theirs: ModuleType, missing: set[str], stack: contextlib.ExitStack) -> None:
    changes: dict[str, Any] = {}
    if "xformers" in missing:
        changes["xformers"] = sys.modules["xformers"]
    if "torch_npu" in missing:
        changes["torch_npu"] = sys.modules["torch_npu"]
        changes["is_torch_npu_available"] = lambda: True
    if "torch_xla" in missing:
        changes["flash_attention"] = flash_attention
        changes["is_spmd"] = lambda: False
        changes["is_torch_xla_version"] = _is_new
    for name, value in changes.items():
        if hasattr(theirs, name):
            stack.callback(setattr, theirs, name, getattr(theirs, name))
        else:
            stack.callback(delattr, theirs, name)
        setattr(theirs, name, value)
