"""Fused kernels through Triton's interpreter; `test_fused` runs this in a process of its own.

The interpreter is chosen when a kernel is defined, by ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, each, some, stand_ins
from torch import Tensor, nn

from attnproc import fused, norms, rotary
from attnproc.kernels.fusing import fusable, use_fused
from attnproc.kernels.linear import relu_linear
from attnproc.kernels.triton import lay as home
from attnproc.modules import LpNorm
from attnproc.norms import Norms
from attnproc.prologue import laid
from attnproc.types import QKV, Keys, Scoring, Streams
from attnproc.verify.check import check, graph_breaks

__all__ = ["stand_ins"]

B, S, T, H, D = 2, 5, 3, 3, 12
NORMS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda width: None,
    "rms": lambda width: nn.RMSNorm(width, 1e-5),
    "layer": lambda width: nn.LayerNorm(width, 1e-5),
    "layer-plain": lambda width: nn.LayerNorm(width, 1e-5, elementwise_affine=False),
    "l2": lambda width: LpNorm(eps=1e-5),
}


def tables(form: Any, tokens: int) -> Any:
    def angles(*shape: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randn(shape)
        return drawn.cos(), drawn.sin()

    if form is rotary.pairs:
        return angles(tokens, D)
    if form is rotary.halves:
        return angles(tokens, D - 4)
    if form is rotary.per_head:
        return angles(tokens, H, D // 2)
    if form is rotary.complex_pairs:
        return torch.polar(torch.ones(B, tokens, D // 2), torch.randn(B, tokens, D // 2))
    places = [torch.randint(0, 7, (tokens,)) for _ in range(3)]
    return [angles(7, D // 3) for _ in range(3)], places


def drawn_norm(kind: str, width: int) -> nn.Module | None:
    norm = NORMS[kind](width)
    for weight in [] if norm is None else norm.parameters():
        nn.init.normal_(weight)
    return norm


def both_ways(make: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """The fused outcome and its gradients are those of the composed parts."""
    found = make()
    use_fused(False)
    try:
        right = make()
    finally:
        use_fused(True)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    along = torch.randn_like(right)
    grads = torch.autograd.grad(found, inputs, along)
    for mine, other in zip(grads, torch.autograd.grad(right, inputs, along), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


FORMS = (rotary.pairs, rotary.halves, rotary.per_head, rotary.complex_pairs, rotary.axes)


@pytest.mark.parametrize("text", [False, True, pytest.param("first", marks=pytest.mark.slow)])
@pytest.mark.parametrize("over", ["joint", pytest.param("image", marks=pytest.mark.slow)])
@some("form", FORMS, fast=2, ids=lambda form: form.__name__)
def test_rotary_embedding_and_join(form: Any, over: Any, text: Any) -> None:
    kinds = ["none", "rms", "layer", "l2"]
    kind = kinds[(FORMS.index(form) + bool(text) + (over == "joint")) % 4]
    check_prologue(kind, False, form, over, text)


@pytest.mark.parametrize("across", [False, True])
@some("kind", NORMS, fast=2)
def test_norms(kind: str, across: bool) -> None:
    check_prologue(kind, across and kind != "l2", rotary.pairs, "joint", True)
    check_prologue(kind, across and kind != "l2", None, "joint", True)


def check_prologue(kind: str, across: bool, form: Any, over: Any, text: Any) -> None:
    torch.manual_seed(0)
    width = H * D if across else D
    layers = [drawn_norm(kind, width) for _ in range(4)]
    own = Norms((layers[0], layers[1]), (layers[2], layers[3]) if text else (None, None))
    image = [torch.randn(B, S, H, D, requires_grad=True) for _ in range(3)]
    words = [torch.randn(B, T, H, D, requires_grad=True) for _ in range(3)] if text else []
    turn = None if form is None else rotary.Rotary(form, over=over, keys="always")
    tokens = S + (T if text and over == "joint" else 0)
    table = None if form is None else tables(form, tokens)

    def make() -> Tensor:
        streams = Streams(QKV(*image), QKV(*words) if text else None)
        both = laid(streams, own, text == "first", turn, (table, table))
        return torch.cat((both.q, both.k, both.v))

    weights = [w for layer in layers[: 4 if text else 2] if layer for w in layer.parameters()]
    both_ways(make, [*image, *words, *weights])


@pytest.mark.parametrize(("heads", "dim", "tile"), [(33, 64, (1, 64, 64)), (17, 48, (2, 32, 64))])
def test_all_heads_of_a_token_are_held_at_once(heads: int, dim: int, tile: Any) -> None:
    from attnproc.kernels.triton import lay

    assert lay._fixed(lay.Lay(), heads, dim, False)[-3:] == tile
    torch.manual_seed(0)
    layers = [nn.RMSNorm(dim) for _ in range(4)]
    own = Norms((layers[0], layers[1]), (layers[2], layers[3]))
    image, words = (
        [torch.randn(1, tokens, heads, dim, requires_grad=True) for _ in range(3)]
        for tokens in (S, T)
    )

    def make() -> Tensor:
        both = laid(Streams(QKV(*image), QKV(*words)), own)
        return torch.cat((both.q, both.k, both.v))

    both_ways(make, [*image, *words, *(layer.weight for layer in layers)])


def test_the_norm_at_its_guard_divides_by_a_constant() -> None:
    x = torch.full((1, 2, 1, 16), 1e-9, requires_grad=True)
    own = Norms((LpNorm(eps=1e-5), None))
    both_ways(lambda: laid(Streams(QKV(x, x, x)), own).q, [x])


def test_added_keys_and_values_have_no_queries_of_their_own() -> None:
    torch.manual_seed(0)
    image = [torch.randn(B, S, H, D, requires_grad=True) for _ in range(3)]
    words = [torch.randn(B, T, H, D, requires_grad=True) for _ in range(2)]
    own = Norms((nn.RMSNorm(D), nn.RMSNorm(D)), (None, nn.RMSNorm(D)))

    def make() -> Tensor:
        both = laid(Streams(QKV(*image), QKV(None, *words)), own, True)
        return torch.cat((both.q, both.k, both.v), dim=1)

    both_ways(make, [*image, *words])


def test_views_of_packed_products_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    packed = torch.randn(B, S, 3 * H * D, requires_grad=True)
    own = Norms((nn.RMSNorm(D), nn.RMSNorm(D)))

    def make() -> Tensor:
        parts = [part.unflatten(2, (H, D)) for part in packed.chunk(3, dim=2)]
        both = laid(Streams(QKV(*parts)), own)
        return torch.cat((both.q, both.k, both.v))

    both_ways(make, [packed])


@pytest.mark.parametrize("change", ["hook", "forward", "own class", "table gradient"])
def test_what_is_not_known_through_goes_the_composed_way(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(nn.RMSNorm):
        pass

    called = []
    monkeypatch.setattr(home, "lay", lambda *args: called.append(args))
    norm: Any = Own(D) if change == "own class" else nn.RMSNorm(D)
    if change == "hook":
        norm.register_forward_hook(lambda *args: None)
    if change == "forward":
        norm.forward = nn.Identity().forward
    table = [torch.randn(S, D) for _ in range(2)]
    if change == "table gradient":
        table[0].requires_grad_()
    x = torch.randn(B, S, H, D)
    with torch.no_grad():
        turn = rotary.Rotary(rotary.pairs)
        laid(Streams(QKV(x, x, x)), Norms((norm, None)), False, turn, (tuple(table), None))
    assert not called


@pytest.mark.parametrize(("queries", "keys", "dim"), [(70, 130, 8), (5, 1100, 32), (129, 3, 20)])
def test_linear_attention(queries: int, keys: int, dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 3, dim).transpose(1, 2).requires_grad_() for n in (queries, keys, keys)
    )
    valid = torch.rand(2, keys) > 0.3
    scoring = Scoring(mask=Keys(valid), eps=1e-6)
    assert fusable(q)
    both_ways(lambda: relu_linear(q, k, v, scoring), [q, k, v])
    right = relu_linear(q.double(), k.double(), v.double(), scoring)
    torch.testing.assert_close(relu_linear(q, k, v, scoring).double(), right, rtol=1e-4, atol=1e-5)


def test_a_half_precision_result_is_rounded_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(B, S, H, D)
    norm, table = nn.RMSNorm(D, 1e-6), tuple(torch.randn(S, D) for _ in range(2))
    turn = rotary.Rotary(rotary.pairs)
    # The interpreter cuts bfloat16 off, so float16 it is.
    half = x.half()
    with torch.no_grad():
        found = laid(
            Streams(QKV(half, half, half)), Norms((norm, None)), False, turn, (table, None)
        )
        use_fused(False)
        wide = half.double()
        right = rotary.pairs(
            F.rms_norm(wide, (D,), norm.weight.double(), 1e-6), tuple(t.double() for t in table)
        )
        use_fused(True)
    error = (found.q.double() - right).abs() / right.abs().clamp(min=1e-2)
    assert error.max() <= 2.0**-11


WANTED = ("Flux", "SD3IP", "Mochi", "Lumina", "Hunyuan", "CogVideoX", "Allegro", "StableAudio")
SOME = [case for case in CASES if any(name in case.id for name in WANTED) and "rope" in case.id]


@pytest.mark.usefixtures("stand_ins")
@each(SOME[::8], fast=6)
def test_classes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    plain = fused.Fused.laid
    monkeypatch.setattr(fused.Fused, "laid", lambda self: calls.append(plain(self)) or calls[-1])
    assert not check(case, low=False).failures
    assert any(call is not None for call in calls)


def test_norm_formulas_are_read_off_the_layers() -> None:
    known = norms.formula(nn.LayerNorm(H * D, 1e-3), H, D, torch.float32)
    assert known is not None
    assert (known.kind, known.eps, known.across) == ("layer", 1e-3, True)
    assert norms.formula(nn.LayerNorm(7), H, D, torch.float32) is None


@pytest.mark.usefixtures("stand_ins")
@each(SOME[3::8], fast=6)
def test_compiled_code_keeps_the_kernels_in_one_graph(case: Case) -> None:
    assert graph_breaks(case) == 0


def equal_with_gradients(found: Tensor, right: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, right, rtol=0, atol=0)
    along = torch.randn_like(right)
    grads = torch.autograd.grad(found, inputs, along)
    for mine, other in zip(grads, torch.autograd.grad(right, inputs, along), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_the_operators_of_compiled_code_are_those_of_eager_code() -> None:
    from attnproc.kernels.triton import lay, linear

    torch.manual_seed(0)
    x, then = (torch.randn(B, n, H, D, requires_grad=True) for n in (S, T))
    w0, b0, w1, b1 = (torch.randn(D, requires_grad=True) for _ in range(4))
    table = torch.randn(1, S + T, 1, D), torch.randn(1, S + T, 1, D)
    how = lay.Lay((2, 2), (1e-5, 1e-5), False, (True, True), True, 2, D)
    found = lay.lay(x, then, how, (w0, b0, w1, b1), table)
    right = torch.ops.attnproc.lay(x, then, w0, b0, w1, b1, *table, *how.plainly())
    equal_with_gradients(found, right, [x, then, w0, b0, w1, b1])

    q, k, v = (torch.randn(B, H, n, D, requires_grad=True) for n in (S, T, T))
    right = torch.ops.attnproc.relu_linear(q, k, v, 1e-6)[0].transpose(1, 2)
    equal_with_gradients(linear.linear_attention(q, k, v, 1e-6), right, [q, k, v])


def test_gradients_of_gradients_are_an_error() -> None:
    from attnproc.kernels.triton.lay import Lay, lay

    x = torch.randn(1, 2, 1, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(lay(x, None, Lay((1, 0))).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(slope.sum(), x)


def test_transforms_of_functions_go_the_composed_way() -> None:
    x = torch.randn(2, 3, 5, 16)
    found = torch.func.jvp(lambda q: relu_linear(q, x, x, Scoring(eps=1e-6)), (x,), (x,))
    wide = x.double()
    right = torch.func.jvp(
        lambda q: relu_linear(q, wide, wide, Scoring(eps=1e-6)), (wide,), (wide,)
    )
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5)
