"""Fused kernels, compiled for a GPU without one; see test_interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import NEEDS_TRITON, compiled, traced
from torch import Tensor

pytestmark = NEEDS_TRITON


TURNS = {
    "no turn": (False, False, False, 2, 0, 1),
    "pairs, joint": (True, True, True, 2, 128, 1),
    "pairs a head": (True, False, False, 2, 128, 2),
    "halves": (True, False, False, 64, 64, 1),
}


def _pairs() -> list[Any]:
    """Every norm with every form; the slow set has those beside the diagonal."""
    return [
        pytest.param(norm, turn, marks=[] if norm == i else [pytest.mark.slow])
        for norm in range(4)
        for i, turn in enumerate(TURNS)
    ]


@pytest.mark.parametrize("direction", ["_forward", "_backward"])
@pytest.mark.parametrize(("norm", "turn"), _pairs())
def test_the_prologue_compiles_for_a_gpu(direction: str, norm: int, turn: str) -> None:
    from attnproc.kernels.triton import lay

    first, second, joint, width, turned, step = TURNS[turn]
    across = norm in (1, 2) and turn == "pairs, joint"
    how = lay.Lay((norm, norm), (0, 0), across, (first, second), joint, width, turned, step)
    fixed = lay._fixed(how, 24, 128, step == 2)
    types = {"eps0": "fp32", "eps1": "fp32"}
    types |= dict.fromkeys(("x0", "x1", "o", "g", "dx0", "dx1", "w0", "w1", "b0", "b1"), "*bf16")
    types |= dict.fromkeys(("cos", "sin", "dw0", "dw1", "db0", "db1"), "*fp32")
    absent = [] if norm in (1, 2) else ["w0", "w1", "dw0", "dw1"]
    absent += [] if norm == 2 else ["b0", "b1", "db0", "db1"]
    absent += [] if first else ["cos", "sin"]
    assert compiled(getattr(lay, direction), fixed, types, absent).asm["cubin"]


@pytest.mark.parametrize("name", ["_sums", "_apply", "_back_queries", "_back_keys"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_linear_attention_compiles_for_a_gpu(name: str, dtype: str) -> None:
    from attnproc.kernels.triton import linear

    fixed = (*linear._tile(32), 256)
    types = {"eps": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "o", "g", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("state", "total", "d_state", "d_total"), "*fp32")
    assert compiled(getattr(linear, name), fixed, types).asm["cubin"]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def prologue(x: Tensor, then: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from attnproc.kernels.triton.lay import Lay, lay

    how = Lay((1, 0), (1e-6, 0.0), False, (True, True), True, 2, 16)
    return lay(x, then, how, (weight, None, None, None), (cos.detach(), sin.detach()))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from attnproc.kernels.triton import linear

    return linear.linear_attention(q, k, v, 1e-6)


def grid(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    from attnproc.kernels.triton import multiscale

    with torch.no_grad():
        return multiscale.normed_grid(y, x, x, (weight, None, 1e-6))


def scales(x: Tensor, weight: Tensor, tap: Tensor, mix: Tensor) -> Tensor:
    from attnproc.kernels.triton import multiscale

    with torch.no_grad():
        return multiscale.scaled_products(x, [weight] * 3, [tap, tap], [mix, mix])


def prompts(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    from attnproc.kernels.triton import branches

    with torch.no_grad():
        return branches.attended(q, [(k, v, weight), (k, v, 0.5)], None)


ROWS, WIDE, TABLE = (2, 8, 3, 16), (2, 3, 8, 16), (1, 13, 1, 16)
# Per operator: its inputs, and what each kernel writes, forward and backward.
TRACED: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], dict[str, set[str]]]] = {
    "prologue": (
        prologue,
        [ROWS, (2, 5, 3, 16), (16,), TABLE, TABLE],
        {"_forward": {"o"}, "_backward": {"dx0", "dx1", "dw0"}},
    ),
    "linear attention": (
        linear_attention,
        [WIDE] * 3,
        {
            "_sums": {"state", "total"},
            "_apply": {"o"},
            "_back_queries": {"dq", "d_state", "d_total"},
            "_back_keys": {"dk", "dv"},
        },
    ),
    "grid": (grid, [(2, 8, 16), (2, 16, 2, 4), (16,)], {"_norm": {"o"}}),
    "scales": (
        scales,
        [(2, 8, 4, 6), (16, 8), (48, 1, 3, 3), (48, 4, 1, 1)],
        {"_convolve": {"all_scales"}},
    ),
    "prompts": (prompts, [WIDE, (2, 8, 48), (2, 8, 48), (1, 8, 1)], {"_attend": {"o"}}),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", TRACED)
def test_compiled_code_launches_the_kernels_itself(
    name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, shapes, right = TRACED[name]
    found = traced(function, [drawn(*shape) for shape in shapes], dynamic, monkeypatch)
    assert found == right


@pytest.mark.parametrize("name", ["lay", "relu_linear", "normed_tokens", "scales", "branches"])
def test_torch_knows_the_kernels_of_an_operator(name: str) -> None:
    # What it keeps of compiled code on disk is out of date when one of them changes.
    library = pytest.importorskip("torch._library.triton")
    if not hasattr(library, "get_triton_kernels_for_op"):
        pytest.skip("this torch does not look for them")

    import attnproc.kernels.triton.branches
    import attnproc.kernels.triton.lay
    import attnproc.kernels.triton.linear
    import attnproc.kernels.triton.multiscale  # noqa: F401

    assert library.get_triton_kernels_for_op(f"attnproc::{name}")
