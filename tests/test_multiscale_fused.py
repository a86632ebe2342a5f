"""DC-AE's fused kernels, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

import pytest
import torch
from on_gpu import NEEDS_TRITON, compiled

from attnproc.attention import SanaMultiscaleLinearAttention
from attnproc.kernels.fusing import use_fused

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize(("dtype", "size", "dim"), [("bf16", 5, 32), ("fp32", 3, 8)])
@pytest.mark.parametrize("ones", [(), ("height", "width"), ("channels",)])
@pytest.mark.parametrize("copies", [False, True])
def test_the_convolution_compiles_for_a_gpu(
    copies: bool, ones: tuple[str, ...], dtype: str, size: int, dim: int
) -> None:
    from attnproc.kernels.triton import multiscale

    types = dict.fromkeys(("products", "taps", "mix", "all_scales"), f"*{dtype}")
    fixed = (*multiscale._tile(size, dim), copies)
    found = compiled(multiscale._convolve, fixed, types, (), ones)
    assert found.asm["cubin"]


@pytest.mark.parametrize("absent", [(), ("x",), ("weight", "bias")])
@pytest.mark.parametrize("ones", [(), ("x_token",), ("x_channel", "tokens")])
def test_the_way_out_compiles_for_a_gpu(ones: tuple[str, ...], absent: tuple[str, ...]) -> None:
    from attnproc.kernels.triton import multiscale

    fixed = (512, multiscale._CHANNELS, multiscale._TOKENS)
    types = {**dict.fromkeys(("y", "x", "weight", "bias", "o"), "*bf16"), "eps": "fp32"}
    assert compiled(multiscale._norm, fixed, types, absent, ones).asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dim", [16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_the_kernels_are_as_near_as_the_composed_parts_on_a_gpu(
    dtype: torch.dtype, dim: int
) -> None:
    torch.manual_seed(0)
    attn = SanaMultiscaleLinearAttention(
        256, 256, attention_head_dim=dim, norm_type="rms_norm", kernel_sizes=(3, 5),
        residual_connection=True,
    ).to("cuda", dtype)  # fmt: skip
    x = torch.randn(2, 256, 33, 41, device="cuda", dtype=dtype)
    found = attn(x).double()
    use_fused(False)
    try:
        other, right = attn(x).double(), attn.double()(x.double())
    finally:
        use_fused(True)
    assert (found - right).abs().mean() <= 1.1 * (other - right).abs().mean() + 1e-5
