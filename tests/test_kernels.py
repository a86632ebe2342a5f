"""Kernels of other packages against recorded stand-ins; memory and gradients of the tiles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from attnproc.kernels import (
    CHUNKED,
    FLASH2,
    FLASH3,
    FLASH4,
    REFERENCE,
    VARLEN,
    Kernel,
    Refused,
    ask,
    attention,
    hub,
    named,
    use_hub,
    why_not,
)
from attnproc.kernels.around import grouped
from attnproc.kernels.channel import by_channel, worth_a_channel
from attnproc.kernels.linear import relu_linear
from attnproc.kernels.oracle import oracle
from attnproc.kernels.packed import pack
from attnproc.types import Bias, Blocks, Keys, Scoring

if TYPE_CHECKING:
    from fakes import FakeFlash, FakeHub, FakeSage

pytest_plugins = ("fakes",)


def inputs(keys: int = 7, queries: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(3, 4, queries, 8, requires_grad=True)
    k, v = (torch.randn(3, 2, keys, 8, requires_grad=True) for _ in range(2))
    return q, k, v


VALID = torch.tensor([[1, 1, 1, 0, 1, 0, 0], [0] * 7, [1] * 7]).bool()
SCORINGS = {
    "none": Scoring(),
    "scale": Scoring(scale=0.3),
    "keys": Scoring(mask=Keys(VALID), scale=0.3),
    "causal": Scoring(causal=True),
    "window": Scoring(window=(2, None)),
    "causal window": Scoring(causal=True, window=(2, None)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)])
def test_a_mask_over_keys_as_channels(rows: slice, dtype: torch.dtype) -> None:
    # One row's keys are all hidden: what comes out is zero.
    scoring = Scoring(mask=Keys(VALID[rows]), scale=0.3)
    q, k, v = (10 * t.detach().to(dtype) for t in inputs())
    found = by_channel(q, k, v, scoring)
    right, _ = oracle(q, k, v, Keys(VALID[rows]), scale=0.3)
    allowed = 1e-4 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), right, rtol=allowed, atol=10 * allowed)
    # It is for cuDNN alone.
    assert not worth_a_channel(q, k, v, scoring)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mask", [None, Keys(VALID), Keys(VALID[:1])], ids=["none", "keys", "one"])
@pytest.mark.parametrize("keys", [7, 5])
def test_linear_attention_without_gradients(keys: int, mask: Keys | None, dtype: Any) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, keys, 4, 8).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 3, 7, 2, 8).to(dtype).transpose(2, 3)
    kept = [t.clone() for t in (q, k, v)]
    scoring = Scoring(mask=mask, eps=1e-6)
    right = relu_linear(q, k, v, scoring)
    with torch.no_grad():
        found = relu_linear(q, k, v, scoring)
    torch.testing.assert_close(found, right)
    # Its heads are joined by a view, and what it was given stays as it is.
    assert found.transpose(1, 2).is_contiguous()
    assert all(map(torch.equal, (q, k, v), kept))


def equal(kernel: Kernel, scoring: Scoring) -> None:
    """Values, log-sum-exp and gradients as the reference has them."""
    q, k, v = inputs()
    o = kernel(q, k, v, scoring)
    right, right_lse = REFERENCE.with_lse(q, k, v, scoring)
    torch.testing.assert_close(o, right)
    if kernel.with_lse is not None and kernel.takes.lse:
        lse = kernel.with_lse(q, k, v, scoring, *kernel.options)[1]
        torch.testing.assert_close(lse, right_lse)
    grads, wanted = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (o, right))
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("case", SCORINGS)
@pytest.mark.parametrize("kernel", [FLASH2, FLASH3, FLASH4], ids=lambda k: k.name)
def test_flash_attn(
    kernel: Kernel,
    case: str,
    fake_flash: FakeFlash,
    fake_flash3: FakeFlash,
    request: pytest.FixtureRequest,
) -> None:
    if kernel is FLASH4:
        request.getfixturevalue("fake_flash4")
    equal(kernel, SCORINGS[case])


@pytest.mark.parametrize("case", SCORINGS)
def test_varlen(case: str, fake_varlen: FakeFlash) -> None:
    scoring = SCORINGS[case]
    if scoring.window is None or fake_varlen.has_windows:
        equal(VARLEN, scoring)
        equal(VARLEN, scoring.but(scale=torch.tensor(0.3)))
        return
    reasons = why_not(VARLEN.takes, ask(*inputs(), scoring))
    assert "mask window: this version of torch has none" in reasons


def test_flash_attn_takes_dropout_in_version_2_alone(fake_flash: FakeFlash) -> None:
    q, k, v = inputs()
    FLASH2(q, k, v, Scoring(dropout=0.5))
    assert fake_flash.dropout == 0.5
    asked = ask(q, k, v, Scoring(dropout=0.5))
    assert "dropout: it has none" in why_not(FLASH3.takes, asked)


@pytest.mark.parametrize("case", ["none", "scale", "causal"])
@pytest.mark.parametrize("name", ["sage", "sage_fp16"])
def test_sage(name: str, case: str, fake_sage: FakeSage) -> None:
    equal(named(name), SCORINGS[case])
    # The real one takes and ignores what it doesn't know.
    assert all(not call["kwargs"] for call in fake_sage.calls)


def test_sage_over_padding(fake_sage: FakeSage) -> None:
    equal(named("sage_varlen"), SCORINGS["keys"])
    equal(named("sage_varlen"), SCORINGS["none"])


def test_sage_without_a_function_says_so(fake_sage: FakeSage) -> None:
    with pytest.raises(ImportError, match="has no sageattn_qk_int8_pv_fp8_cuda: pip install"):
        named("sage_fp8")(*inputs(), Scoring())


@pytest.fixture
def undecided() -> Iterator[None]:
    yield
    hub._CHOSEN.clear()
    hub._LOADED.clear()


@pytest.mark.usefixtures("undecided")
def test_the_hub_is_asked_for_a_named_revision_alone(fake_hub: FakeHub) -> None:
    kernel = named("flash_hub")
    q, k, v = inputs()
    with pytest.raises(ImportError, match="name the revision to trust"):
        kernel(q, k, v, Scoring())
    with pytest.raises(Refused, match="is not fetched on its own"):
        attention(q, k, v, backend="flash_hub")
    assert fake_hub.calls == []

    use_hub("flash_hub", revision="abc123")
    equal(kernel, SCORINGS["keys"])
    assert fake_hub.calls == [("kernels-community/flash-attn2", "abc123")]
    with pytest.raises(ValueError, match="kernels of the hub are flash_hub"):
        use_hub("math", revision="abc123")


def of_hub(
    name: str, channels: int, heads: int, dtype: torch.dtype
) -> tuple[Kernel, list[Tensor]]:
    """A kernel of the hub that may be fetched, and inputs for it."""
    use_hub(name, revision="abc123")
    torch.manual_seed(0)
    shapes = ((3, 4, 7, channels), (3, heads, 7, channels), (3, heads, 7, channels))
    return named(name), [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("case", ["none", "scale", "causal"])
@torch.no_grad()
def test_sage_of_the_hub(case: str, fake_hub: FakeHub) -> None:
    scoring = SCORINGS[case]
    kernel, qkv = of_hub("sage_hub", 8, 2, torch.float32)
    torch.testing.assert_close(kernel(*qkv, scoring), REFERENCE(*qkv, scoring))
    assert all(not call["kwargs"] for call in fake_hub.sage.calls)

    kernel, qkv = of_hub("sage_blackwell_hub", 64, 4, torch.float32)
    before = [t.clone() for t in qkv]
    torch.testing.assert_close(kernel(*qkv, scoring), REFERENCE(*before, scoring))
    assert all(map(torch.equal, qkv, before))
    (call,) = fake_hub.sage3.calls
    assert call == {"attn_mask": None, "is_causal": scoring.causal, "kwargs": {}}
    if case == "scale":
        tensor = Scoring(scale=torch.tensor(0.3))
        torch.testing.assert_close(kernel(*qkv, tensor), REFERENCE(*qkv, scoring))


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("case", ["none", "scale", "causal", "window", "causal window"])
@torch.no_grad()
def test_aiter_of_the_hub(case: str, fake_hub: FakeHub) -> None:
    scoring = SCORINGS[case]
    kernel, qkv = of_hub("aiter_fa2_hub", 8, 2, torch.bfloat16)
    wide = [t.float() for t in qkv]
    o, lse = kernel.with_lse(*qkv, scoring, *kernel.options)
    right, right_lse = REFERENCE.with_lse(*wide, scoring)
    torch.testing.assert_close(o.float(), right, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, right_lse)
    assert torch.equal(kernel(*qkv, scoring), o)


@pytest.mark.usefixtures("undecided", "fake_hub")
@pytest.mark.parametrize(
    ("name", "heads", "channels", "dtype", "reason"),
    [
        ("sage_blackwell_hub", 4, 40, torch.bfloat16, "40 channels a head: it takes 64 to 128"),
        ("sage_blackwell_hub", 4, 96, torch.bfloat16, "in steps of 64"),
        ("sage_blackwell_hub", 2, 64, torch.bfloat16, "2 key heads for 4 query heads"),
        ("aiter_fa2_hub", 4, 64, torch.float16, "dtype float16: it takes bfloat16"),
    ],
)
def test_kernels_of_the_hub_refuse(
    name: str, heads: int, channels: int, dtype: torch.dtype, reason: str
) -> None:
    kernel, qkv = of_hub(name, channels, heads, dtype)
    asked = ask(*qkv, Scoring())._replace(device="cuda")
    assert any(reason in found for found in why_not(kernel.takes, asked))
    graded = asked._replace(backward=True, kinds=frozenset({"keys"}))
    reasons = why_not(kernel.takes, graded)
    assert "gradients: it has no backward" in reasons
    assert any(found.startswith("mask keys") for found in reasons)


def test_packing_is_static_and_keeps_the_rest_out() -> None:
    q, k, v = inputs()
    packed = pack(q, k, v, Scoring(mask=Keys(VALID)))
    assert packed.k_starts.tolist() == [0, 4, 4, 11]
    assert packed.empty.tolist() == [False, True, False]
    assert packed.k.shape == (21, 2, 8)
    torch.testing.assert_close(packed.k[3], k[0, :, 4])
    assert not packed.k[11:].any()
    # What a kernel leaves in the gradient of the rest must not come through.
    upstream = torch.full_like(packed.k, torch.nan)
    upstream[:11] = 1
    (grad,) = torch.autograd.grad(packed.k, k, upstream)
    torch.testing.assert_close(grad[:, 0, :, 0], VALID.float())


# Tiles


def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i // 3 == j // 3) | (j == h)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mods", [(), (near,)])
def test_chunked_has_right_gradients(causal: bool, mods: tuple, monkeypatch) -> None:
    monkeypatch.setitem(CHUNKED.run.__globals__["_SCORES"], "cpu", 100)
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 2, 1, 6, dtype=torch.float64, requires_grad=True)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        scoring = Scoring(mask=Bias(tensors[3]), causal=causal, mods=mods)
        return CHUNKED.with_lse(*tensors[:3], scoring)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


@pytest.mark.parametrize(("queries", "keys"), product((1, 17, 100), (1, 33, 129)))
def test_chunked_with_tiles_of_any_remainder(queries: int, keys: int, monkeypatch) -> None:
    monkeypatch.setitem(CHUNKED.run.__globals__["_SCORES"], "cpu", 6000)
    q, k, v = inputs(keys, queries)
    for scoring in (Scoring(causal=True), Scoring(window=(5, 3)), Scoring(mods=(near,))):
        torch.testing.assert_close(CHUNKED(q, k, v, scoring), REFERENCE(q, k, v, scoring))


@pytest.mark.parametrize("name", ["sdpa", "flash_sdpa", "math", "chunked", "reference", "auto"])
def test_rows_without_keys_are_zero(name: str) -> None:
    q, k, v = inputs()
    nothing = Bias(torch.full((1, 1, 7, 7), -torch.inf))
    for mask in (Keys(VALID), nothing, Blocks(lambda b, h, i, j: (b != 1) & (i == j))):
        o = attention(q, k, v, mask, backend=name)
        grads = torch.autograd.grad(o.sum(), (q, k, v))
        assert not o[1].any()
        assert not any(g[1].any() or g.isnan().any() for g in grads)


@pytest.mark.parametrize("name", [*SCORINGS, "bias", "blocks"])
@torch.no_grad()
def test_many_scores_are_made_for_some_queries_at_a_time(name: str, monkeypatch) -> None:
    bias = Scoring(mask=Bias(torch.randn(1, 4, 7, 7)))
    more = {"bias": bias, "blocks": Scoring(mods=(near,))}
    scoring = {**SCORINGS, **more}[name]
    qkv = inputs()
    whole = REFERENCE(*qkv, scoring)
    monkeypatch.setitem(REFERENCE.run.__globals__, "_SCORES", 200)
    torch.testing.assert_close(REFERENCE(*qkv, scoring), whole)


MEMORY = """
import resource, torch
from attnproc.kernels import attention
from attnproc.types import Keys
n = 32768
q, k, v = (torch.randn(1, 1, n, 64, requires_grad=True) for _ in range(3))
mask = Keys.first(torch.tensor([n - 5000]), n)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention(q, k, v, mask, backend={name!r}).sum().backward()
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory in KiB")
@pytest.mark.parametrize("name", ["auto", "chunked"])
def test_32768_tokens_with_padding_take_less_than_2_gib(name: str) -> None:
    code = MEMORY.format(name=name)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, peak = map(int, out.stdout.split())
    print(f"{name}: {before / 1024:.0f} MiB before, {peak / 1024:.0f} MiB at the peak")
    assert peak < 2 * 1024 * 1024


@pytest.mark.parametrize("kind", ["plain", "causal", "keys", "bias"])
def test_rows_that_see_the_same_keys(kind: str) -> None:
    q = torch.randn(6, 3, 5, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in "kv")
    scoring = {
        "plain": Scoring(scale=0.3),
        "causal": Scoring(causal=True),
        "keys": Scoring(mask=Keys(torch.arange(7) < torch.arange(1, 7)[:, None])),
        "bias": Scoring(mask=Bias(torch.randn(6, 1, 5, 7, dtype=torch.float64))),
    }[kind]
    many = [t.repeat_interleave(3, dim=0) for t in (k, v)]
    found = grouped(REFERENCE, q, k, v, scoring)
    torch.testing.assert_close(found, REFERENCE(q, *many, scoring))
    with pytest.raises(ValueError, match="a batch of 6, which the 4 of its keys do not divide"):
        grouped(REFERENCE, q, k.repeat(2, 1, 1, 1), v, scoring)
