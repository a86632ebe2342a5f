"""Masks in normal form: kinds, combinations, what is refused, what the classes make of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnproc
from attnproc.kernels import attention
from attnproc.kernels.oracle import oracle
from attnproc.kernels.visible import dense_mask
from attnproc.masks import Room, factors, fold
from attnproc.types import All, Bias, Blocks, Causal, Keys, MaskKind, Scoring, Window

ROOM = Room((2,), heads=4, queries=5, keys=7)
VALID = torch.tensor([[1, 1, 1, 0, 1, 0, 0], [1] * 7]).bool()


def same_block(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i // 2 == j // 2


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)


KINDS = {
    "keys": Keys(VALID),
    "lengths": Keys.first(torch.tensor([3, 7]), 7),
    "dense": Bias(torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4),
    "bias": Bias(torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(1))),
    "causal": Causal(),
    "window": Window(1, 2),
    "half a window": Window(None, 2),
    "blocks": Blocks(same_block),
}


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_kinds_combine(one: str, other: str) -> None:
    q, k, v = inputs()
    both = KINDS[one] & KINDS[other]
    assert both.parts == (KINDS[one], KINDS[other])
    torch.testing.assert_close(attention(q, k, v, both), oracle(q, k, v, both)[0].float())


def test_normal_form() -> None:
    three = Keys(VALID) & Keys.first(torch.tensor([3, 7]), 7) & Causal()
    scoring = fold(three & Window(4, 2) & Window(1, None) & Blocks(same_block), Scoring(), ROOM)
    assert isinstance(scoring.mask, Keys)
    assert scoring.mask.valid[0].tolist() == [True, True, True, False, False, False, False]
    assert (scoring.causal, scoring.window, scoring.mods) == (True, (1, 2), (same_block,))
    mixed = fold(Bias(torch.ones(1, 1, 1, 7) / 2) & Keys(VALID), Scoring(), ROOM).mask
    assert mixed.values[0, 0, 0].tolist() == [
        0.5,
        0.5,
        0.5,
        -torch.inf,
        0.5,
        -torch.inf,
        -torch.inf,
    ]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2, 7), Keys),
        ((2, 1, 7), Keys),
        ((2, 5, 7), Bias),
        ((8, 1, 7), Bias),
        ((1, 4, 1, 7), Bias),
    ],
)
def test_tensors_of_every_shape(shape: tuple[int, ...], kind: type) -> None:
    mask = torch.rand(shape) > 0.5
    scoring = fold(mask, Scoring(), ROOM)
    assert isinstance(scoring.mask, kind)
    assert dense_mask(scoring, *inputs()[:2]).shape[-1] == 7
    floats = fold(torch.zeros(shape), Scoring(), ROOM)
    assert isinstance(floats.mask, Bias)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 7).long(), r"int64: give bool \(true means attend\) or float"),
        (torch.ones(2, 6).bool(), r"ends in 6 keys, this call has 7 \(all keys\)"),
        (torch.ones(3, 7).bool(), "does not broadcast to"),
        (VALID.float(), r"of zeros and ones.*Give mask.bool\(\)"),
        (VALID.half()[:, None], "of zeros and ones"),
        (Keys(VALID.float()), "of zeros and ones"),
    ],
)
def test_what_means_nothing_is_refused(mask: Tensor | MaskKind, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*inputs(), mask)


def test_float_masks_that_are_no_zero_one_masks_pass() -> None:
    for mask in (torch.zeros(2, 7), torch.ones(2, 7), (1 - VALID.float()) * -10000, VALID / 2):
        attention(*inputs(), mask)
    changed = torch.zeros(2, 7)
    attention(*inputs(), changed)
    changed[:, 0] = 1
    with pytest.raises(ValueError, match="zeros and ones"):
        attention(*inputs(), changed)


def test_compiled_code_does_not_look_at_values() -> None:
    torch._dynamo.reset()
    run = torch.compile(attention, backend="eager", fullgraph=True)
    run(*inputs(), VALID.float())


def test_linear_attention_takes_masks_over_keys() -> None:
    for mask in (Keys(VALID), Bias(torch.zeros(1, 4, 1, 7)), All(())):
        factors(fold(mask, Scoring(), ROOM), torch.float32)
    for mask in (Causal(), Window(1, 1), Blocks(same_block), Bias(VALID[:, None, None] & True)):
        if mask is not None and not isinstance(mask, Bias):
            with pytest.raises(ValueError, match="linear attention takes a mask over keys"):
                factors(fold(mask, Scoring(), ROOM), torch.float32)


def layer(processor: str, **options: object) -> attnproc.Attention:
    torch.manual_seed(0)
    return attnproc.Attention(
        16, heads=2, dim_head=8, processor=getattr(attnproc, processor)(**options)
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AttnProcessor", {}),
        ("AttnProcessor2_0", {}),
        ("SlicedAttnProcessor", {"slice_size": 3}),
        ("PAGIdentitySelfAttnProcessor2_0", {}),
    ],
)
def test_classes_take_every_kind(name: str, options: dict) -> None:
    x = torch.randn(4, 7, 16)
    valid = torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    batch = Blocks(by_row)
    for kind in (Keys(valid), Causal(), Window(2, 0), batch, batch & Keys(valid) & Causal()):
        dense = dense_mask(
            fold(kind, Scoring(), Room((4,), 2, 7, 7)), *[torch.zeros(4, 2, 7, 8)] * 2
        )
        got = layer(name, **options)(x, attention_mask=kind)
        torch.testing.assert_close(got, layer(name, **options)(x, attention_mask=dense))


def by_row(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i + b + h) & (j >= i - b)


def test_mochi_takes_keys_of_the_text() -> None:
    proc = attnproc.MochiAttnProcessor2_0()
    torch.manual_seed(0)
    attn = attnproc.MochiAttention(16, 16, heads=2, dim_head=8, out_dim=16, processor=proc)
    image, text = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    valid = torch.arange(4) < torch.tensor([[4], [2]])
    torch.testing.assert_close(
        attn(image, text, attention_mask=Keys(valid)), attn(image, text, attention_mask=valid)
    )


def attended(attn: attnproc.Attention, mask: Tensor) -> Tensor:
    torch.manual_seed(0)
    return attnproc.AttnProcessor2_0()(attn, torch.randn(1, 6, 16), attention_mask=mask)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_comes_to_hide_something_is_honoured(mode: type) -> None:
    attn = attnproc.Attention(query_dim=16, heads=2, dim_head=8)
    with mode():
        mask = torch.ones(1, 6, dtype=torch.bool)
        whole = attended(attn, mask)
        mask[:, 4:] = False
        torch.testing.assert_close(attended(attn, mask), attended(attn, mask.clone()))
        assert not torch.allclose(attended(attn, mask), whole)
