"""DC-AE's fused kernels by Triton's interpreter; `test_multiscale_fused` runs this in a process.

The interpreter is chosen when a kernel is defined, by ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, Case, each, some, stand_ins
from torch import Tensor, nn

from attnproc import fused_grid, layouts, outputs, pack
from attnproc.attention import SanaMultiscaleLinearAttention
from attnproc.kernels.fusing import use_fused
from attnproc.modules import SanaMultiscaleAttentionProjection
from attnproc.verify.check import check, graph_breaks

__all__ = ["stand_ins"]

CHANNELS = 32


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """Whether the kernels ran, call by call, on the way in and on the way out."""
    found: dict[str, list[bool]] = {"scaled": [], "normed": []}

    def watch(home: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(fused_grid, name)

        def call(*args: Any) -> Any:
            result = plain(*args)
            found[name].append(result is not None)
            return result

        monkeypatch.setattr(home, name, call)

    watch(layouts, "scaled")
    watch(outputs, "normed")
    return found


@contextmanager
def composed() -> Iterator[None]:
    use_fused(False)
    try:
        yield
    finally:
        use_fused(True)


def drawn(**options: Any) -> SanaMultiscaleLinearAttention:
    """A module without gradients, whose norm is no longer as it begins."""
    torch.manual_seed(0)
    options = {"attention_head_dim": 16, "norm_type": "rms_norm", **options}
    attn = SanaMultiscaleLinearAttention(CHANNELS, CHANNELS, **options)
    for weight in attn.norm_out.parameters():
        nn.init.normal_(weight)
    return attn.requires_grad_(False)


def both_ways(attn: nn.Module, x: Tensor, allowed: float = 1e-4) -> None:
    found = attn(x)
    with composed():
        right = attn(x)
    torch.testing.assert_close(found, right, rtol=allowed, atol=allowed)
    if min(x.shape) > 1:
        assert found.stride() == right.stride()


# Below one tile and above it either way; the quadratic form takes the first two.
GRIDS = [(1, 1), (2, 3), (1, 20), (9, 10)]


@some("size", GRIDS, fast=2)
@pytest.mark.parametrize("sizes", [(), (5,), pytest.param((3, 1), marks=pytest.mark.slow)])
def test_every_scale(
    sizes: tuple[int, ...], size: tuple[int, int], answers: dict[str, list[bool]]
) -> None:
    attn = drawn(kernel_sizes=sizes, residual_connection=True)
    both_ways(attn, torch.randn(2, CHANNELS, *size))
    assert answers == {"scaled": [True, False], "normed": [True, False]}


@some("dim", (12, 8, 32), fast=3)
@pytest.mark.parametrize("residual", [False, True])
def test_heads_and_residual(residual: bool, dim: int, answers: dict[str, list[bool]]) -> None:
    attn = drawn(attention_head_dim=dim, residual_connection=residual)
    both_ways(attn, torch.randn(1, CHANNELS, 6, 9))
    assert answers["scaled"][0]
    assert answers["normed"][0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "part of a grid": lambda x: x[:, :, 1:, :7],
    "turned": lambda x: x.transpose(2, 3),
}


@some("layout", LAYOUTS, fast=2)
def test_a_grid_in_any_layout_of_memory(layout: str, answers: dict[str, list[bool]]) -> None:
    attn = drawn(residual_connection=True)
    both_ways(attn, LAYOUTS[layout](torch.randn(2, CHANNELS, 6, 9)))
    assert answers["scaled"][0]
    assert answers["normed"][0]


def test_packed_projections_take_one_product(
    answers: dict[str, list[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attn, products = drawn(), []
    pack(attn)
    plain = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda *args, **kw: products.append(args) or plain(*args, **kw)
    )
    with torch.no_grad():
        both_ways(attn, torch.randn(2, CHANNELS, 5, 6))
    assert answers["scaled"][0]
    assert len(products) == 1


def test_half_precision_is_no_further_off_than_the_composed_parts() -> None:
    # The interpreter cuts bfloat16 off, so float16 it is.
    attn = drawn(residual_connection=True).half()
    x = torch.randn(2, CHANNELS, 9, 11).half()
    found = attn(x).double()
    with composed():
        other, right = attn(x).double(), attn.double()(x.double())
    assert (found - right).abs().max() <= 1.1 * (other - right).abs().max()


def changed(change: str, attn: Any) -> None:
    block, norm = attn.to_qkv_multiscale[0], attn.norm_out
    if change == "hook on a convolution":
        block.proj_in.register_forward_hook(lambda *args: 2 * args[2])
    if change == "hook on a block":
        block.register_forward_hook(lambda *args: 2 * args[2])
    if change == "hook on a projection":
        attn.to_k.register_forward_hook(lambda *args: 2 * args[2])
    if change == "padding by reflection":
        block.proj_in.padding_mode = "circular"
        block.proj_in._reversed_padding_repeated_twice = [2, 2, 2, 2]
    if change == "dilation":
        block.proj_in.dilation, block.proj_in.padding = (2, 2), (4, 4)
    if change == "bias":
        block.proj_out.bias = nn.Parameter(torch.randn(3 * CHANNELS), requires_grad=False)
    if change == "another block":
        attn.to_qkv_multiscale[0] = Doubled(CHANNELS, 2, 5).requires_grad_(False)
    if change == "ungrouped":
        block.proj_in = nn.Conv2d(96, 96, 3, padding=1, groups=48, bias=False)
        block.proj_in.requires_grad_(False)
    if change == "hook on the norm":
        norm.register_forward_hook(lambda *args: 2 * args[2])
    if change == "wide norm":
        norm.double()


class Doubled(SanaMultiscaleAttentionProjection):
    """A block that does something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


OF_THE_WAY_IN = [
    "hook on a convolution",
    "hook on a block",
    "hook on a projection",
    "padding by reflection",
    "dilation",
    "bias",
    "another block",
    "ungrouped",
]


@pytest.mark.parametrize("change", [*OF_THE_WAY_IN, "hook on the norm", "wide norm"])
def test_what_is_not_known_through_goes_the_composed_way(
    change: str, answers: dict[str, list[bool]]
) -> None:
    attn = drawn()
    changed(change, attn)
    both_ways(attn, torch.randn(1, CHANNELS, 5, 6))
    expected = change not in OF_THE_WAY_IN
    assert answers["scaled"][0] == expected
    assert answers["normed"][0] != expected


def test_gradients_come_by_the_composed_parts(answers: dict[str, list[bool]]) -> None:
    attn = drawn().requires_grad_(True)
    x = torch.randn(1, CHANNELS, 5, 6)
    attn(x).sum().backward()
    assert all(weight.grad is not None for weight in attn.parameters())
    attn.requires_grad_(False)
    attn(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert answers == {"scaled": [False, False], "normed": [False, False]}
    with torch.no_grad():
        attn(x)
    assert answers["scaled"][2]
    assert answers["normed"][2]


def test_autocast_and_adapters_go_the_composed_way(answers: dict[str, list[bool]]) -> None:
    attn: Any = drawn()
    x = torch.randn(1, CHANNELS, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        attn(x)
    attn.processor = attn.processor.with_lora(attn, "style", rank=2).requires_grad_(False)
    attn(x)
    assert answers["scaled"] == [False, False]


SOME = [case for case in CASES if case.cls == "SanaMultiscaleAttnProcessor2_0"]


@pytest.mark.usefixtures("stand_ins")
@each(SOME[::3], fast=4)
def test_the_class(case: Case, answers: dict[str, list[bool]]) -> None:
    assert not check(case, low=False).failures
    assert any(answers["scaled"])


@pytest.mark.usefixtures("stand_ins")
@each([case for case in SOME if "rms" in case.id][:1])
def test_compiled_code_keeps_the_kernels_in_one_graph(case: Case) -> None:
    assert graph_breaks(case) == 0


def test_compiled_code_runs_the_kernels(answers: dict[str, list[bool]]) -> None:
    attn, seen = drawn(residual_connection=True), []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(2, CHANNELS, 5, 6)
    found = torch.compile(attn, backend=keep, fullgraph=True)(x)
    torch.testing.assert_close(found, attn(x))
    assert any("scales" in name for name in seen)
    assert any("normed_tokens" in name for name in seen)
