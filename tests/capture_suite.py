"""Capture by its fused kernel, through Triton's interpreter; `test_capture_kernel` runs this.

The interpreter has no products of bfloat16; `test_cuda` has them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import some
from spies import spied
from test_capture import Model, plain_weights
from torch import Tensor

from attnproc.capture import Box, Capture, Maps, capture
from attnproc.kernels import AUTO
from attnproc.kernels.fusing import use_fused
from attnproc.types import Bias, Keys, Scoring

B, H, Q, K, D = 4, 4, 37, 21, 12
HOME: Any = import_module("attnproc.kernels.triton.maps")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The grids that the kernel was launched with."""
    seen: list[Any] = []
    launch = HOME._maps
    monkeypatch.setattr(HOME, "_maps", lambda *args: seen.append(args[0]) or launch(*args))
    return seen


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def drawn(heads: int = H, dim: int = D, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries and keys as projections lay them out."""
    torch.manual_seed(0)
    sizes = (B, Q, H, dim), (B, K, heads, dim)
    return [torch.randn(size).to(dtype).transpose(1, 2) for size in sizes]


def call(maps: Maps, q: Tensor, k: Tensor, scoring: Scoring, layer: str = "layer") -> None:
    Capture(maps, layer)(AUTO, q, k, torch.zeros_like(k), scoring)


def close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-5)


def seen_of_row() -> Tensor:
    """A mask with an empty row, and another in each row of the batch."""
    seen = torch.rand(B, 1, Q, K) > 0.4
    seen[:, :, 5] = False
    return seen


def with_nothing_seen() -> Tensor:
    """A bias whose first query sees nothing, and whose second all keys alike."""
    bias = torch.randn(1, H, Q, K)
    bias[:, :, 0], bias[:, :, 1] = -torch.inf, torch.finfo(torch.float32).min
    return bias


SCORINGS: dict[str, Callable[[], Scoring]] = {
    "plain": Scoring,
    "scaled": lambda: Scoring(scale=2),
    "keys": lambda: Scoring(mask=Keys(torch.arange(K) < torch.tensor([[3], [K], [1], [9]]))),
    "same keys": lambda: Scoring(mask=Keys(torch.rand(1, K) > 0.5)),
    "bool": lambda: Scoring(mask=Bias(seen_of_row())),
    "bias": lambda: Scoring(mask=Bias(with_nothing_seen())),
    "half bias": lambda: Scoring(mask=Bias(torch.randn(B, H, 1, K).half())),
    "strided bias": lambda: Scoring(mask=Bias(torch.randn(1, 1, K, Q).mT)),
}


@pytest.mark.parametrize("heads", [H, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCORINGS)
def test_weights_are_those_of_plain_attention(name: str, heads: int, launches: list[Any]) -> None:
    q, k = drawn(heads)
    scoring = SCORINGS[name]()
    maps = Maps({"a": (3, 20), "b": 7, "twice": (7, 7)}, part=(1, 2))

    call(maps, q, k, scoring)

    assert launches == [(-(-Q // 16), 2)]
    right = plain_weights(q, k, scoring)[2:].mean(dim=1)
    right = [right[..., [3, 20]].sum(dim=-1), right[..., 7], 2 * right[..., 7]]
    close(maps.sums["layer"], torch.stack(right, dim=-1))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 40), (torch.float32, 64)])
def test_all_keys_of_all_rows(dtype: torch.dtype, dim: int, launches: list[Any]) -> None:
    q, k = drawn(dim=dim, dtype=dtype)
    maps = Maps(part=(0, 1))

    call(maps, q, k, Scoring())

    assert launches
    close(maps.sums["layer"], plain_weights(q, k, Scoring()).mean(dim=1))


def test_an_image_behind_a_text(launches: list[Any]) -> None:
    """Queries that do not begin at the first, and keys that end before the last."""
    q, k = drawn()
    scoring = Scoring(mask=Bias(torch.randn(B, H, Q, K)), image=(6, Q), image_keys=(6, K))
    maps = Maps([0, 5], part=(0, 2))

    call(maps, q, k, scoring)

    assert launches
    close(maps.sums["layer"], plain_weights(q, k, scoring)[:2, :, 6:, [0, 5]].mean(dim=1))


@pytest.mark.parametrize("each_step", [False, True])
def test_later_calls_are_added(each_step: bool, launches: list[Any]) -> None:
    q, k = drawn()
    maps = Maps([1, 2], part=(0, 1), each_step=each_step)
    single = Maps([1, 2], part=(0, 1))
    call(single, q, k, Scoring())
    for _ in range(3):
        call(maps, q, k, Scoring())

    assert len(launches) == 4
    assert maps.calls == {"layer": 3}
    assert len(maps.taken["layer"]) == (3 if each_step else 1)
    torch.testing.assert_close(maps.sums["layer"], 3 * single.sums["layer"])
    torch.testing.assert_close(maps.mean(aspect=1 / Q), single.mean(aspect=1 / Q))


def test_fused_and_composed_calls_make_one_sum(launches: list[Any]) -> None:
    q, k = drawn()
    maps = Maps([1, 2], part=(0, 1))
    for wanted in (True, False, True):
        use_fused(wanted)
        call(maps, q, k, Scoring())

    assert len(launches) == 2
    close(maps.sums["layer"], 3 * plain_weights(q, k, Scoring())[..., [1, 2]].mean(dim=1))


def test_a_call_of_another_size_is_not_added(launches: list[Any]) -> None:
    q, k = drawn()
    maps = Maps([1, 2], part=(0, 1))
    call(maps, q, k, Scoring())
    before = maps.sums["layer"]
    with pytest.raises(RuntimeError, match="size"):
        call(maps, q[:, :, :9], k, Scoring())
    assert torch.equal(maps.sums["layer"], before)


Inputs = tuple[Tensor, Tensor, Scoring]


CHANGES: dict[str, Callable[[Tensor, Tensor], Inputs]] = {
    "a mask": lambda q, k: (q, k, Scoring(mask=Keys(torch.rand(B, K) > 0.5))),
    "another mask": lambda q, k: (q, k, Scoring(mask=Keys(torch.rand(1, K) > 0.5))),
    "a bool mask": lambda q, k: (q, k, Scoring(mask=Bias(seen_of_row()))),
    "a bias": lambda q, k: (q, k, Scoring(mask=Bias(torch.randn(B, H, Q, K)))),
    "a strided bias": lambda q, k: (q, k, Scoring(mask=Bias(torch.randn(B, H, K, Q).mT))),
    "a half bias": lambda q, k: (q, k, Scoring(mask=Bias(torch.randn(B, H, Q, K).half()))),
    "a scale": lambda q, k: (q, k, Scoring(scale=0.3)),
    "causal": lambda q, k: (q, k, Scoring(causal=True)),
    "a window": lambda q, k: (q, k, Scoring(window=(3, 2))),
    "dtype": lambda q, k: (q.half(), k.half(), Scoring()),
    "double": lambda q, k: (q.double(), k.double(), Scoring()),
    "strides of queries": lambda q, k: (q.contiguous(), k, Scoring()),
    "strides of keys": lambda q, k: (q, k.contiguous(), Scoring()),
    "a place off 16 bytes": lambda q, k: (q[..., 1:], k[..., 1:], Scoring()),
    "channels": lambda q, k: (q[..., :8], k[..., :8], Scoring()),
    "queries": lambda q, k: (q[:, :, :9], k, Scoring()),
    "keys": lambda q, k: (q, k[:, :, :9], Scoring()),
    "rows": lambda q, k: (q[:2], k[:2], Scoring()),
    "heads": lambda q, k: (q[:, :2], k[:, :2], Scoring()),
    "key heads": lambda q, k: (q, k[:, :2], Scoring()),
    "image": lambda q, k: (q, k, Scoring(image=(6, Q))),
    "a text": lambda q, k: (q, k, Scoring(image_keys=(6, K))),
}


@some("change", CHANGES, fast=3)
def test_calls_of_a_layer_that_differ(change: str) -> None:
    """What was worked out for the first call serves the third, and not the second."""
    q, k = drawn()
    inputs = [(q, k, Scoring()), CHANGES[change](q, k), (q, k, Scoring())]
    maps = Maps([0, 5], part=(1, 2), each_step=True)
    for each in inputs:
        call(maps, *each)

    for (q, k, scoring), found in zip(inputs, maps.taken["layer"], strict=True):
        right = plain_weights(q, k, scoring)[..., [0, 5]].mean(dim=1)
        start = 0 if scoring.image is None else scoring.image[0]
        close(found, right[q.shape[0] // 2 :, start:])


@some("change", ("a mask", "a bias", "a scale", "dtype", "double", "causal"), fast=2)
def test_calls_that_differ_make_one_sum(change: str) -> None:
    q, k = drawn()
    inputs = [(q, k, Scoring()), CHANGES[change](q, k), (q, k, Scoring())]
    maps = Maps([0, 5], part=(0, 1))
    for each in inputs:
        call(maps, *each)

    right = [plain_weights(*some)[..., [0, 5]].mean(dim=1) for some in inputs]
    close(maps.sums["layer"], torch.stack(right).sum(dim=0))


def test_what_changes_in_place_between_calls() -> None:
    (q, k), mask = drawn(), torch.rand(B, H, Q, K) > 0.5
    scoring = Scoring(mask=Bias(mask))
    maps, right = Maps([0, 5], part=(0, 1)), torch.zeros(B, Q, 2, dtype=torch.float64)
    for _ in range(3):
        call(maps, q, k, scoring)
        right += plain_weights(q, k, scoring)[..., [0, 5]].mean(dim=1)
        q *= -0.5
        k += 0.1
        mask.logical_not_()

    close(maps.sums["layer"], right)


def test_layers_alike_share_what_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = spied(monkeypatch, HOME, "KeyMaps")
    (q, k), maps = drawn(), Maps([0, 5], part=(0, 1))
    for layer in ("a", "b", "a", "b"):
        call(maps, q.clone(), k.clone(), Scoring(), layer)
    assert len(made) == 1
    call(maps, q, k, Scoring(scale=2), "a")
    assert len(made) == 2


def test_maps_pickle_and_go_on() -> None:
    (q, k), maps = drawn(), Maps([0, 5], part=(0, 1))
    call(maps, q, k, Scoring())
    again = pickle.loads(pickle.dumps(maps))
    call(again, q, k, Scoring())
    torch.testing.assert_close(again.sums["layer"], 2 * maps.sums["layer"])


@pytest.mark.parametrize("name", ["half a sum", "a sum in double", "a strided sum"])
def test_sums_that_a_launch_cannot_add_to(name: str) -> None:
    (q, k), maps = drawn(), Maps([0, 5], part=(0, 1))
    call(maps, q, k, Scoring())
    kept = maps.taken["layer"]
    sums = {"half a sum": kept[0].half(), "a sum in double": kept[0].double()}
    kept[0] = sums.get(name, kept[0].mT.contiguous().mT)
    right = plain_weights(q, k, Scoring())[..., [0, 5]].mean(dim=1)
    call(maps, q, k, Scoring())

    torch.testing.assert_close(maps.sums["layer"].double(), 2 * right, rtol=0, atol=1e-3)


COMPOSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {"causal": True}),
    "window": ({}, {"window": (2, 1)}),
    "kept queries": ({}, {"keep": Keys(torch.arange(Q).expand(B, Q) > 3)}),
    "tensor scale": ({}, {"scale": torch.tensor(0.5)}),
    "each head": ({"heads": "each"}, {}),
    "some heads": ({"heads": [0, 2]}, {}),
    "regions": ({"regions": {"left": Box(0, 0, 0.5, 1)}, "aspect": 1 / Q}, {}),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_what_the_kernel_does_not_take_goes_the_composed_way(
    name: str, launches: list[Any]
) -> None:
    (options, scoring), (q, k) = COMPOSED[name], drawn()
    maps, right = (Maps([1, 2], (0, 1), **options) for _ in range(2))
    call(maps, q, k, Scoring(**scoring))
    use_fused(False)
    call(right, q, k, Scoring(**scoring))

    assert not launches
    assert torch.equal(maps.sums["layer"], right.sums["layer"])


@pytest.mark.parametrize("kind", ["double", "channels apart", "two dtypes", "many channels"])
def test_tensors_that_the_kernel_does_not_take(kind: str, launches: list[Any]) -> None:
    q, k = drawn(dim=520 if kind == "many channels" else D)
    if kind == "double":
        q, k = q.double(), k.double()
    if kind == "channels apart":
        k = k.mT.contiguous().mT
    maps = Maps([1, 2], (0, 1))
    if kind == "two dtypes":
        maps.add("layer", maps.reduced(q, k.double(), Scoring()))
    else:
        call(maps, q, k, Scoring())

    assert not launches
    close(maps.sums["layer"], plain_weights(q, k, Scoring())[..., [1, 2]].mean(dim=1))


@pytest.fixture(autouse=True)
def fused_again() -> Iterator[None]:
    yield
    use_fused(True)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_maps_of_a_model(mode: Any, launches: list[Any]) -> None:
    model = Model()
    use_fused(False)
    before = model()
    with capture(model) as right:
        model()
    use_fused(True)
    with mode(), capture(model) as maps:
        inside = model()

    assert len(launches) == 2
    assert torch.equal(inside, before)
    assert maps.calls == right.calls
    for layer, found in maps.sums.items():
        close(found, right.sums[layer].double())
