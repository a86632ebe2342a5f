"""Twelve things that diffusers 0.42.1 does and that can't happen here, in its list's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import attnproc
from attnproc.kernels import NPU, XFORMERS, Refused, attention, named
from attnproc.kernels.external import xla
from attnproc.kernels.oracle import oracle
from attnproc.types import Bias, Keys, MaskKind, Scoring

if TYPE_CHECKING:
    from fakes import FakeTorchNPU, FakeTorchXLA, FakeXFormers

pytest_plugins = ("fakes",)


def qkv(queries: int = 20, keys: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 2, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    return tuple(torch.randn(shape) for shape in shapes)


def flex(*inputs: Any, **options: Any) -> Tensor:
    """FlexAttention in a graph, by torch's eager stand-in for its compiled kernel."""
    torch._dynamo.reset()
    run = torch.compile(attention, backend="eager", fullgraph=True)
    return run(*inputs, **options, backend="flex")


def joint(processor: Any, *, fused: bool = False, qk_norm: str | None = "rms_norm") -> Any:
    """SD3.5's joint attention with norms that matter."""
    torch.manual_seed(0)
    attn = attnproc.Attention(
        16,
        heads=2,
        dim_head=8,
        added_kv_proj_dim=16,
        added_proj_bias=True,
        context_pre_only=False,
        out_dim=16,
        qk_norm=qk_norm,
        processor=processor,
    )
    for name, parameter in attn.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.2, 3)
    if fused:
        attn.fuse_projections()
    return attn


def streams(batch: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 9, 16), torch.randn(batch, 5, 16)


def test_1_flex_honours_causality() -> None:
    q, k, v = qkv()
    got = flex(q, k, v, causal=True)
    torch.testing.assert_close(got, oracle(q, k, v, causal=True)[0].float())


@pytest.mark.parametrize("queries", [20, 11])
def test_2_flex_puts_key_masks_on_keys(queries: int) -> None:
    q, k, v = qkv(queries)
    mask = torch.arange(20) < torch.tensor([[13], [4]])
    torch.testing.assert_close(flex(q, k, v, mask), oracle(q, k, v, Keys(mask))[0].float())


def test_3_a_float_mask_of_zeros_and_ones_is_refused() -> None:
    mask = (torch.arange(20) < torch.tensor([[13], [4]])).float()
    with pytest.raises(ValueError, match=r"would hide nothing. Give mask.bool\(\)"):
        attention(*qkv(), mask)


def test_4_fused_joint_attention_keeps_its_norms() -> None:
    plain = joint(attnproc.JointAttnProcessor2_0())(*streams())
    fused = joint(attnproc.FusedJointAttnProcessor2_0(), fused=True)(*streams())
    torch.testing.assert_close(fused, plain)


def test_5_perturbed_joint_attention_keeps_its_norms() -> None:
    image, text = streams(4)
    plain = joint(attnproc.JointAttnProcessor2_0())(image[:2], text[:2])
    perturbed = joint(attnproc.PAGJointAttnProcessor2_0())(image, text)
    torch.testing.assert_close(tuple(out[:2] for out in perturbed), plain)


def test_6_joint_attention_uses_its_mask() -> None:
    image, text = streams()
    attn = joint(attnproc.JointAttnProcessor2_0())
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[:, 3:] = False
    masked, _ = attn(image, text, attention_mask=valid)
    cut, _ = attn(image, text[:, :3])
    torch.testing.assert_close(masked, cut)
    assert not torch.allclose(masked, attn(image, text)[0])


@pytest.mark.parametrize(
    "processor", [attnproc.AttnProcessor(), attnproc.SlicedAttnProcessor(1)], ids=type
)
def test_7_eager_and_sliced_attention_keep_their_norms(processor: Any) -> None:
    def layer(processor: Any) -> Any:
        torch.manual_seed(0)
        attn = attnproc.Attention(
            16, heads=2, dim_head=8, qk_norm="layer_norm", processor=processor
        )
        for norm in (attn.norm_q, attn.norm_k):
            torch.nn.init.uniform_(norm.weight, 0.2, 3)
        return attn

    x, _ = streams()
    torch.testing.assert_close(layer(processor)(x), layer(attnproc.AttnProcessor2_0())(x))


def test_8_fused_flux_attention_runs_on_an_npu(fake_torch_npu: FakeTorchNPU) -> None:
    x, text = streams()
    outs = []
    for kernel in (NPU, named("sdpa")):
        processor = attnproc.FusedFluxAttnProcessor2_0().but(kernel=kernel)
        attn = joint(processor, fused=True).bfloat16()
        outs.append(attn(x.bfloat16(), text.bfloat16()))
    torch.testing.assert_close(*outs, atol=0.05, rtol=0.05)
    assert len(fake_torch_npu.calls) == 1
    assert named("_native_npu").name == "npu"


def test_9_a_models_backend_is_its_own() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry
    from tiny_models import built

    before = _AttentionBackendRegistry._active_backend
    models = [built("sd3")[0] for _ in range(2)]
    for model in models:
        attnproc.swap(model)
    try:
        models[0].set_attention_backend("_native_math")
        for model, name in zip(models, ("math", None), strict=True):
            processors = model.attn_processors.values()
            found = {p._attention_backend and named(p._attention_backend).name for p in processors}
            assert found == {name}
    finally:
        _AttentionBackendRegistry._active_backend = before


def test_10_xformers_gets_bool_masks_as_biases(fake_xformers: FakeXFormers) -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 1, 20, 20) > 0.5
    got = XFORMERS(q, k, v, Scoring(mask=Bias(mask)))
    torch.testing.assert_close(got, oracle(q, k, v, Bias(mask))[0].float())
    bias = fake_xformers.calls[-1]["attn_bias"]
    assert set(bias.unique().tolist()) == {-torch.inf, 0.0}
    # The heads share one copy.
    assert bias.shape == (2, 2, 20, 20)
    assert bias.stride(1) == 0


def test_11_xla_gets_the_scale(fake_torch_xla: FakeTorchXLA) -> None:
    q, k, v = qkv()
    got = xla(q, k, v, Scoring(scale=0.5))
    torch.testing.assert_close(got, oracle(q, k, v, scale=0.5)[0].float())
    assert fake_torch_xla.calls[-1]["sm_scale"] == 0.5


def test_12_packing_refuses_masks_that_differ_between_queries() -> None:
    q, k, v = qkv()
    diagonal: MaskKind = Bias(torch.eye(20, dtype=torch.bool)[None, None])
    for name in ("varlen", "flash_varlen"):
        with pytest.raises(
            (Refused, ImportError), match="mask dense: it takes causal, keys, window"
        ):
            attention(q, k, v, diagonal, backend=name)
    torch.testing.assert_close(attention(q, k, v, diagonal), v)
