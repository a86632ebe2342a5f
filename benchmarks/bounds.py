"""What bounds diffusers' calls by arithmetic alone: operations, bytes and launches, no device.

    python benchmarks/bounds.py      # writes benchmarks/results/bounds.json, in seconds

Each call runs on tensors without data. Products count their operations, everything else the bytes
that it reads and writes, every operator once and nothing kept in a cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from results import RESULTS
from rows import ROWS, Row
from sides import pair
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Bound", "bound"]

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
# Allocations, which run nothing.
_NOTHING = ("empty", "empty_strided", "new_empty", "empty_like", "detach", "_local_scalar_dense")


@dataclass
class Bound:
    """What one call does.

    Attributes:
        product_flop: Operations of linear layers and other matrix products.
        attention_flop: Operations of fused attention.
        product_bytes: What products and attention must read and write.
        pass_bytes: What every other operator reads and writes.
        passes: How many those operators are.
        launches: All operators.
    """

    product_flop: float = 0
    attention_flop: float = 0
    product_bytes: float = 0
    pass_bytes: float = 0
    passes: int = 0
    launches: int = 0


@torch.no_grad()
def bound(row: Row) -> Bound:
    """Counts a row's call by diffusers."""
    both = pair(row, "meta", torch.bfloat16)
    found = Bound()
    with _Attention(found), _Operators(found):
        both.call("diffusers")()
    return found


class _Attention(TorchFunctionMode):
    """Counts fused attention as one operator; there is no kernel for tensors without data."""

    def __init__(self, found: Bound) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is torch.nonzero:
            # How many are true is in the data; taken as all.
            return torch.arange(args[0].numel(), device="meta")[:, None]
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        (batch, heads, queries, dim), keys = query.shape, key.shape[2]
        o = torch.empty(batch, queries, heads, value.shape[3], dtype=query.dtype, device="meta")
        self.found.attention_flop += 2 * batch * heads * queries * keys * (dim + value.shape[3])
        read = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        self.found.product_bytes += _bytes((*read, o))
        self.found.launches += 1
        return o.transpose(1, 2)


class _Operators(TorchDispatchMode):
    """Counts every operator that makes or changes data."""

    def __init__(self, found: Bound) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._schema.name.partition("::")[2]
        if name.rstrip("_") in _NOTHING or not made:
            return out
        held = {_storage(t) for t in read}
        if all(_storage(t) in held for t in made) and not func._schema.is_mutable:
            return out
        self.found.launches += 1
        if name in _PRODUCTS:
            self.found.product_flop += _flop(name, read, made[0])
            self.found.product_bytes += _bytes((*read, *made))
        else:
            self.found.pass_bytes += _bytes((*read, *made))
            self.found.passes += 1
        return out


def _flop(name: str, read: list[Tensor], out: Tensor) -> float:
    if name == "convolution":
        weight = read[1]
        return 2.0 * out.numel() * weight[0].numel()
    # The second factor's rows, behind what is added.
    depth = read[-1].shape[-2]
    return 2.0 * out.numel() * depth


def _bytes(tensors: Iterable[Tensor]) -> int:
    """What lies in memory: a tensor that repeats by strides of zero counts once."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def main() -> None:
    """Counts all rows."""
    found = {row.name: asdict(bound(row)) for row in ROWS}
    path = RESULTS / "bounds.json"
    path.write_text(
        json.dumps({"command": "benchmarks/bounds.py", "rows": found}, indent=1) + "\n"
    )
    for name, counts in found.items():
        print(f"{name:26}", {key: f"{value:.3g}" for key, value in counts.items()})


if __name__ == "__main__":
    main()
