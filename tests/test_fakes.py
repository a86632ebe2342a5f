"""The stand-ins for other packages compute what they say and refuse what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fakes import FakeTorchNPU, FakeTorchXLA, FakeXFormers

pytest_plugins = ("fakes",)

SCALE = 0.3


def heads(length: int = 5, count: int = 2) -> Tensor:
    return torch.randn(2, count, length, 8)  # [B, H, S, D]


def expected(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE, **options)


def test_xformers_layouts_and_biases(fake_xformers: FakeXFormers) -> None:
    from xformers import ops

    q, k, v = heads(), heads(8), heads(8)
    bias = torch.randn(2, 1, 1, 8).expand(2, 2, 5, 8)
    tokens = [x.transpose(1, 2) for x in (q, k, v)]
    got = ops.memory_efficient_attention(*tokens, attn_bias=bias, scale=SCALE)
    torch.testing.assert_close(got.transpose(1, 2), expected(q, k, v, bias))
    assert fake_xformers.calls[-1]["attn_bias"] is bias

    flat, flat_bias = [x.flatten(0, 1) for x in (q, k, v)], bias.flatten(0, 1)
    got = ops.memory_efficient_attention(*flat, flat_bias, scale=SCALE)
    torch.testing.assert_close(got.unflatten(0, (2, 2)), expected(q, k, v, bias))
    got = ops.memory_efficient_attention(*tokens, ops.LowerTriangularMask(), scale=SCALE)
    torch.testing.assert_close(got.transpose(1, 2), expected(q, k, v, is_causal=True))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(2, 1, 5, 8), ValueError, "full shape"),
        (torch.zeros(2, 2, 5, 8).bfloat16(), ValueError, "dtype of the query"),
        (torch.zeros(2, 2, 8, 5).transpose(2, 3), NotImplementedError, "not aligned"),
        (torch.zeros(2, 2, 5, 8, dtype=torch.bool), ValueError, "dtype of the query"),
    ],
)
def test_xformers_refuses_biases(
    fake_xformers: FakeXFormers, bias: Tensor, error: type[Exception], message: str
) -> None:
    tokens = [heads(length).transpose(1, 2) for length in (5, 8, 8)]
    with pytest.raises(error, match=message):
        fake_xformers.memory_efficient_attention(*tokens, bias)


def test_xformers_bias_of_odd_length_is_a_slice(fake_xformers: FakeXFormers) -> None:
    tokens = [heads(length).transpose(1, 2) for length in (5, 7, 7)]
    with pytest.raises(NotImplementedError, match="not aligned"):
        fake_xformers.memory_efficient_attention(*tokens, torch.zeros(2, 2, 5, 7))
    fake_xformers.memory_efficient_attention(*tokens, torch.zeros(2, 2, 5, 8)[..., :7])


def test_npu_masks_discard_and_biases_are_scaled(fake_torch_npu: FakeTorchNPU) -> None:
    import torch_npu

    q, k, v = heads(5, 4), heads(7), heads(7)
    keep = torch.rand(2, 1, 5, 7) > 0.4
    keep[..., 0] = True
    bias = torch.randn(1, 4, 5, 7)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    both = bias.masked_fill(~keep, float("-inf"))
    got = torch_npu.npu_fusion_attention(
        q, k, v, 4, "BNSD", atten_mask=~keep, pse=bias / SCALE, scale=SCALE
    )
    assert len(got) == 7
    torch.testing.assert_close(got[0], expected(q, *wide, both))
    scores = (q @ wide[0].mT) * SCALE + both
    lse = got[1][..., 0] + got[2][..., 0].log()
    torch.testing.assert_close(lse, scores.logsumexp(-1))

    tokens = [x.transpose(1, 2) for x in (q, k, v)]
    got = torch_npu.npu_fusion_attention(*tokens, 4, "BSND", scale=SCALE)
    torch.testing.assert_close(got[0].transpose(1, 2), expected(q, *wide))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atten_mask": torch.zeros(2, 1, 1, 7, dtype=torch.bool)}, "atten mask is not"),
        ({"atten_mask": torch.zeros(5, 7)}, "neither bool"),
        ({"pse": torch.zeros(5, 7)}, "pse is not"),
        ({"head_num": 3}, "head num"),
        ({"input_layout": "BSH"}, "layouts"),
        ({"keep_prob": 0.0}, "keep prob"),
        ({"sparse_mode": 2}, "compressed mask"),
    ],
)
def test_npu_refuses(fake_torch_npu: FakeTorchNPU, options: dict[str, Any], message: str) -> None:
    arguments = {"head_num": 2, "input_layout": "BNSD", **options}
    with pytest.raises(RuntimeError, match=message):
        fake_torch_npu.npu_fusion_attention(heads(), heads(7), heads(7), **arguments)


def test_xla_scales_biases_and_keeps_segments(fake_torch_xla: FakeTorchXLA) -> None:
    from torch_xla.experimental.custom_kernel import flash_attention
    from torch_xla.runtime import is_spmd

    q, k, v = heads(), heads(7), heads(7)
    bias = torch.randn(2, 2, 5, 7)
    got = flash_attention(q, k, v, sm_scale=SCALE, ab=bias / SCALE)
    torch.testing.assert_close(got, expected(q, k, v, bias))
    valid = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    got = flash_attention(q, k, v, False, torch.ones(2, 5), valid, SCALE)
    torch.testing.assert_close(got, expected(q, k, v, valid.bool()[:, None, None]))
    torch.testing.assert_close(flash_attention(q, k, v), (q @ k.mT).softmax(-1) @ v)
    assert not is_spmd()


def test_xla_refuses(fake_torch_xla: FakeTorchXLA) -> None:
    call = fake_torch_xla.flash_attention
    q, k = heads(), heads(7)
    for options, message in (
        ({"ab": torch.zeros(2, 1, 5, 7)}, "full shape"),
        ({"q_segment_ids": torch.ones(2, 5)}, "both or not"),
        ({"partition_spec": ("data", None)}, "four dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            call(q, k, k, **options)
    with pytest.raises(TypeError, match="attn_mask"):
        call(q, k, k, attn_mask=None)
    fake_torch_xla.device_sizes = True
    with pytest.raises(NotImplementedError, match="multiples of 512"):
        call(heads(513), k, k)
