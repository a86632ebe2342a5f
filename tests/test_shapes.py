"""Views of heads: by strides and by steps they are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnproc.shapes import heads_first, merge_heads

LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 5, 12),
    "a part of a product": lambda: torch.randn(2, 5, 36)[:, :, 12:24],
    "a stream of a sequence": lambda: torch.randn(2, 9, 12)[:, 3:8],
    "tokens of a grid": lambda: torch.randn(2, 12, 5).transpose(1, 2),
    "one row": lambda: torch.randn(1, 5, 12),
    "no tokens": lambda: torch.randn(2, 0, 12),
    "at an offset": lambda: torch.randn(3, 5, 12)[1:],
}


def same(found: Tensor, right: Tensor) -> None:
    assert torch.equal(found, right)
    assert found.data_ptr() == right.data_ptr() or not right.numel()


@pytest.mark.parametrize("name", LAYOUTS)
def test_heads_come_first(name: str) -> None:
    x = LAYOUTS[name]()
    heads = x.unflatten(2, (3, 4))
    for of in (x, heads):
        same(heads_first(of, 4, by_strides=True), heads.transpose(1, 2))
        same(heads_first(of, 4), heads.transpose(1, 2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_heads_are_merged(name: str) -> None:
    x = LAYOUTS[name]()
    same(merge_heads(heads_first(x, 4), by_strides=True), x)
    copied = heads_first(x, 4).contiguous()
    assert torch.equal(merge_heads(copied, by_strides=True), x)


def test_a_batch_of_a_transform_is_seen_through() -> None:
    x = torch.randn(4, 2, 5, 12)

    def both(part: Tensor) -> Tensor:
        return merge_heads(heads_first(part, 4, by_strides=True) * 2, by_strides=True)

    for axis in (0, 1):
        found = torch.vmap(both, in_dims=axis, out_dims=axis)(x)
        torch.testing.assert_close(found, x * 2)
