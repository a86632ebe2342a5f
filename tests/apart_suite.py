"""Masked keys apart from the others, merged by one pass, through Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spies import spied

from attnproc.kernels import use_fused
from attnproc.kernels.apart import apart
from attnproc.kernels.oracle import oracle
from attnproc.kernels.triton import merge
from attnproc.types import Keys, Scoring


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_equals_attention_under_the_mask(
    fused: bool, text_first: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3, 16).transpose(1, 2) for _ in range(3))
    within = (0, 8) if text_first else (62, 70)
    valid = torch.ones(2, 70, dtype=torch.bool)
    # Of the second row's text nothing is seen.
    valid[0, within[0] + 3 : within[1]] = False
    valid[1, within[0] : within[1]] = False
    calls: list[Any] = spied(monkeypatch, merge, "merge")
    use_fused(fused)
    try:
        with torch.no_grad():
            found = apart(q, k, v, Scoring(mask=Keys(valid, within), scale=scale))
    finally:
        use_fused(True)
    assert found is not None
    assert len(calls) == int(fused)
    right = oracle(q, k, v, Keys(valid), scale=scale)[0]
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("within", [None, (5, 8)])
def test_outputs_of_padding_are_zero(in_place: bool, within: tuple[int, int] | None) -> None:
    o, valid = torch.randn(2, 3, 8, 4), torch.ones(2, 8, dtype=torch.bool)
    valid[0, 6:] = False
    valid[1, 5:] = False
    right = o * valid[:, None, :, None]
    before = o.clone()
    found = Scoring(keep=Keys(valid, within)).kept(o, in_place)
    assert torch.equal(found, right)
    assert torch.equal(o, right if in_place and within else before)
