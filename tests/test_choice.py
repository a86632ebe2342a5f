"""Which kernel runs: layer over model over block over recipe; a block is its thread's."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from cases import FIRST, Case, each
from torch import Tensor

import attnproc
from attnproc.kernels import (
    REFERENCE,
    Inaccurate,
    Kernel,
    Refused,
    Takes,
    attention,
    backend,
    named,
    register_kernel,
    set_backend,
)
from attnproc.kernels.base import _REGISTRY
from attnproc.types import Scoring
from attnproc.verify.build import build

USED: list[str] = []


def one(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, name: str) -> Tensor:
    USED.append(name)
    return REFERENCE(q, k, v, scoring)


def crude(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    return REFERENCE(q, k, v, scoring) * 1.1


NAMES = ("spy_a", "spy_b", "spy_c")


@pytest.fixture(autouse=True)
def spies() -> Iterator[None]:
    """Kernels that tell that they ran, under names of their own."""
    USED.clear()
    for name in NAMES:
        register_kernel(Kernel(name, one, (name,)))
    register_kernel(Kernel("spy_crude", crude, takes=Takes(exact=False)))
    register_kernel(Kernel("spy_plain", one, ("spy_plain",), takes=Takes(masks=frozenset())))
    yield
    for name in (*NAMES, "spy_crude", "spy_plain"):
        del _REGISTRY[name]


def model(layers: int = 2) -> torch.nn.ModuleDict:
    modules = {
        f"layer{i}": attnproc.Attention(
            8, heads=2, dim_head=4, processor=attnproc.AttnProcessor2_0()
        )
        for i in range(layers)
    }
    return torch.nn.ModuleDict(modules)


def run(m: torch.nn.ModuleDict) -> list[str]:
    """The spies that a forward pass uses."""
    USED.clear()
    for layer in m.values():
        layer(torch.ones(1, 3, 8))
    return list(USED)


def test_layer_over_model_over_block_over_recipe() -> None:
    m = model()
    assert run(m) == []
    with backend("spy_a"):
        assert run(m) == ["spy_a", "spy_a"]
        set_backend(m, "spy_b")
        assert run(m) == ["spy_b", "spy_b"]
        assert set_backend(m, "spy_c", layers="*1") == ["layer1"]
        assert run(m) == ["spy_b", "spy_c"]
        # As diffusers' setter does it.
        for layer in m.values():
            layer.processor._attention_backend = "spy_a"
        assert run(m) == ["spy_a", "spy_c"]
        set_backend(m, None, layers="*")
        set_backend(m, None)
        with backend("spy_b"):
            assert run(m) == ["spy_b", "spy_b"]
        assert run(m) == ["spy_a", "spy_a"]
    assert run(m) == []
    with backend("spy_a"):
        attention(*[torch.ones(1, 1, 2, 4)] * 3, backend="spy_b")
        assert USED == ["spy_b"]


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="matches no layer of ours, there are: layer0, layer1"):
        set_backend(model(), "math", layers="up*")
    with pytest.raises(ValueError, match="near it: spy_a"):
        set_backend(model(), "spy_aa")
    with pytest.raises(ValueError, match="fallback is 'yes'"), backend("math", fallback="yes"):
        pass
    with pytest.raises(ValueError, match="registered already"):
        register_kernel(Kernel("math", one))


def test_threads_have_blocks_of_their_own() -> None:
    m, meet = model(1), Barrier(2)

    def work(name: str) -> set[str]:
        with backend(name):
            seen: set[str] = set()
            for _ in range(20):
                meet.wait(timeout=20)
                q = torch.ones(1, 1, 2, 4)
                got = attention(q, q, q, backend=None)
                seen.add(attnproc.kernels.scope.scope(compiling=False).name)
                assert got.shape == q.shape
            m["layer0"](torch.ones(1, 3, 8))
            return seen

    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(work, ("spy_a", "spy_b")))
    assert seen == [{"spy_a"}, {"spy_b"}]


def test_tasks_have_blocks_of_their_own() -> None:
    m = model(1)

    async def work(name: str) -> list[list[str]]:
        with backend(name):
            found = []
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(run(m))
            return found

    async def both() -> list[list[list[str]]]:
        return await asyncio.gather(work("spy_a"), work("spy_b"))

    assert asyncio.run(both()) == [[["spy_a"]] * 3, [["spy_b"]] * 3]


def test_compiled_code_follows_the_block() -> None:
    q = torch.randn(1, 2, 4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attention(q, q, q), backend="eager", fullgraph=True)
    plain = compiled(q)
    with backend("spy_crude"):
        torch.testing.assert_close(compiled(q), plain * 1.1)
    torch.testing.assert_close(compiled(q), plain)


def test_a_named_kernel_never_falls_back_unless_told() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(Refused, match=r"mask causal: it takes none. These would: .*chunked"):
        attention(q, q, q, causal=True, backend="spy_plain")
    with pytest.warns(UserWarning, match="the automatic choice runs: mask causal"):
        got = attention(q, q, q, causal=True, backend="spy_plain", fallback="warn")
    torch.testing.assert_close(got, attention(q, q, q, causal=True))
    with warnings.catch_warnings(), backend("spy_plain", fallback="warn"):
        warnings.simplefilter("error")
        attention(q, q, q)
    assert USED == ["spy_plain"]


def test_a_kernel_in_a_recipe_is_checked_too() -> None:
    layer = model(1)["layer0"]
    layer.processor = layer.processor.but(kernel=named("spy_plain"))
    layer(torch.ones(1, 3, 8))
    with pytest.raises(Refused, match="mask keys"):
        layer(torch.ones(1, 3, 8), attention_mask=torch.tensor([[True, False, True]]))


def test_guard_compares_the_first_calls() -> None:
    q = torch.randn(1, 2, 4, 8)
    with backend("spy_crude", max_error=0.2, calls=2):
        attention(q, q, q)
    with (
        backend("spy_crude", max_error=0.01),
        pytest.raises(Inaccurate, match=r"its error is 0\.1"),
    ):
        attention(q, q, q)
    with backend("spy_crude"):
        attention(q, q, q)


def test_guard_compares_compiled_calls() -> None:
    q = torch.randn(1, 2, 4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attention(q, q, q), backend="aot_eager", fullgraph=True)
    with backend("spy_crude", max_error=0.2):
        torch.testing.assert_close(compiled(q), attention(q, q, q))
    with backend("spy_crude", max_error=0.01):
        for _ in range(2):
            with pytest.raises(Inaccurate, match=r"'spy_crude': its error is 0\.1"):
                compiled(q)


def test_quantised_kernels_are_never_automatic() -> None:
    for kernel in attnproc.kernels.registered().values():
        if kernel.name.startswith(("sage", "spy_crude")):
            assert not kernel.takes.exact


# diffusers


@each(FIRST.values())
@pytest.mark.usefixtures("stand_ins", "active", "maths")
@torch.no_grad()
def test_the_block_of_diffusers_reaches_every_class(case: Case) -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    setting = build(case, "ours", torch.float32, own_modules=True)
    linear = setting.processor.recipe.kernel.linear
    with dispatch.attention_backend("_native_math"):
        setting.call()
        assert bool(USED) is not linear
    USED.clear()
    setting.call()
    assert not USED


def test_every_name_of_diffusers_is_known() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    for member in dispatch.AttentionBackendName:
        kernel = named(member)
        if kernel.takes.needs and not kernel.takes.needs.startswith("torch."):
            q = torch.zeros(1, 1, 2, 16)
            with pytest.raises(ImportError, match=r"is not installed: (pip install|build) "):
                attention(q, q, q, backend=member)


@pytest.fixture
def active() -> Iterator[type]:
    """diffusers' registry, put back to its default afterwards."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    registry = dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield registry
    registry._active_backend = before


@pytest.fixture
def maths(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_native_math` and `_native_flash` tell that they ran."""
    monkeypatch.setitem(_REGISTRY, "math", Kernel("math", one, ("math",)))
    monkeypatch.setitem(_REGISTRY, "flash_sdpa", Kernel("flash_sdpa", one, ("flash_sdpa",)))


def built(name: str) -> tuple[torch.nn.Module, dict]:
    pytest.importorskip("diffusers")
    from tiny_models import built

    m, inputs = built(name)
    attnproc.swap(m)
    return m, inputs


def forward(m: torch.nn.Module, inputs: dict) -> set[str]:
    USED.clear()
    with torch.no_grad():
        m(**inputs)
    return set(USED)


@pytest.mark.usefixtures("maths")
def test_the_setter_of_diffusers_reaches_its_model_alone(active: type) -> None:
    (one_model, inputs), (other, _) = built("sd3"), built("sd3")
    one_model.set_attention_backend("_native_math")
    assert active._active_backend.value == "_native_math"
    assert forward(one_model, inputs) == {"math"}
    assert forward(other, inputs) == set()
    one_model.set_attention_backend("_native_flash")
    assert forward(one_model, inputs) == {"flash_sdpa"}
    assert forward(other, inputs) == set()


@pytest.mark.usefixtures("maths", "active")
def test_the_block_of_diffusers_reaches_models_without_a_setting() -> None:
    from diffusers.models.attention_dispatch import attention_backend

    (m, inputs), (other, _) = built("sd3"), built("unet")
    with attention_backend("_native_math"):
        assert forward(m, inputs) == {"math"}
        with backend("spy_a"):
            assert forward(m, inputs) == {"spy_a"}
        with attention_backend("_native_flash"):
            assert forward(m, inputs) == {"flash_sdpa"}
        assert forward(m, inputs) == {"math"}
    assert forward(m, inputs) == set()
    other.set_attention_backend("_native_flash")
    assert forward(m, inputs) == set()
    with attention_backend("_native_math"):
        assert forward(m, inputs) == {"math"}
    assert forward(m, inputs) == set()


@pytest.mark.usefixtures("maths", "active")
def test_blocks_of_diffusers_are_looked_for_when_one_is_entered_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    module = attnproc.kernels.scope
    (m, inputs), (other, _) = built("sd3"), built("sd3")
    forward(m, inputs)
    searches: list[object] = []
    search = module._open_block
    monkeypatch.setattr(module, "_open_block", lambda: searches.append(1) or search())

    with attention_backend("_native_math"), attention_backend("_native_flash"):
        assert forward(m, inputs) == forward(m, inputs) == {"flash_sdpa"}
        assert len(searches) == 1
    assert forward(m, inputs) == set()
    assert len(searches) == 1
    with attention_backend("_native_flash"):
        with attention_backend("_native_math"):
            assert forward(m, inputs) == {"math"}
            # The setter is its model's, also in a block.
            other.set_attention_backend("_native_flash")
            assert forward(other, inputs) == {"flash_sdpa"}
            assert forward(m, inputs) == {"math"}
        assert forward(m, inputs) == {"flash_sdpa"}
    assert forward(m, inputs) == set()


@each(FIRST.values())
@pytest.mark.usefixtures("stand_ins")
def test_a_name_reaches_every_class(case: Case) -> None:
    setting = build(case, "ours", torch.float32, own_modules=True)
    setting.processor._attention_backend = "spy_a"
    with torch.no_grad():
        setting.call()
    # Linear attention is another function, which no name replaces.
    assert bool(USED) is not setting.processor.recipe.kernel.linear
