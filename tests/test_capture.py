"""Captured maps are those of plain attention, and capturing changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, FIRST, each
from torch import Tensor, nn

import attnproc
from attnproc.capture import Box, Capture, Maps, capture, components, key_weights, load
from attnproc.interop import processors
from attnproc.kernels import AUTO, SDPA
from attnproc.kernels.visible import dense_mask
from attnproc.places import sides
from attnproc.types import Bias, Keys, Scoring
from attnproc.verify.build import build

KERNELS = ("reference", "sdpa", "chunked", "math")
BATCH, HEADS, QUERIES, KEYS, DIM = 2, 4, 9, 7, 8


def rows_and_keys() -> Tensor:
    """A mask whose first row is empty."""
    seen = torch.arange(KEYS) <= torch.arange(QUERIES)[:, None]
    return (seen & (torch.arange(QUERIES) > 0)[:, None]).expand(BATCH, 1, QUERIES, KEYS)


SCORINGS: dict[str, Callable[[], Scoring]] = {
    "plain": Scoring,
    "scaled": lambda: Scoring(scale=0.7),
    "keys": lambda: Scoring(mask=Keys(torch.arange(KEYS) < torch.tensor([[5], [7]]))),
    "bias": lambda: Scoring(mask=Bias(torch.randn(1, HEADS, QUERIES, KEYS))),
    "empty_row": lambda: Scoring(mask=Bias(rows_and_keys())),
    "causal": lambda: Scoring(causal=True),
    "window": lambda: Scoring(window=(2, 1)),
}


def plain_weights(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """Attention probabilities ``[B, H, Q, K]`` in float64, written out."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if isinstance(scoring.mask, Keys):
        scores = scores.masked_fill(~scoring.mask.valid[:, None, None], -torch.inf)
    elif isinstance(scoring.mask, Bias) and scoring.mask.values.dtype == torch.bool:
        scores = scores.masked_fill(~scoring.mask.values, -torch.inf)
    elif isinstance(scoring.mask, Bias):
        scores = scores + scoring.mask.values.double()
    apart = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    if scoring.causal:
        scores = scores.masked_fill(apart > 0, -torch.inf)
    if scoring.window is not None:
        left, right = scoring.window
        scores = scores.masked_fill((apart < -left) | (apart > right), -torch.inf)
    return scores.softmax(dim=-1).nan_to_num(0)


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("name", SCORINGS)
def test_weights_are_those_of_plain_attention(
    name: str, key_heads: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("attnproc.capture.weights"), "_CHUNK", chunk)
    torch.manual_seed(0)
    q, k = torch.randn(BATCH, HEADS, QUERIES, DIM), torch.randn(BATCH, key_heads, KEYS, DIM)
    scoring, chosen = SCORINGS[name](), [5, 0, 2]

    found = key_weights(q, k, chosen, scoring)

    expected = plain_weights(q, k, scoring)[..., chosen].mean(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_exact_for_the_queries_and_keys_as_they_are(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 2, 5, DIM).to(dtype), torch.randn(1, 2, KEYS, DIM).to(dtype)

    found = key_weights(q, k, range(KEYS), Scoring())

    expected = plain_weights(q, k, Scoring()).mean(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(dim=-1).double(), torch.ones(1, 5).double())


class Block(nn.Module):
    """Self attention, then cross attention."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"query_dim": 32, "heads": 4, "dim_head": 8}
        self.attn1 = attnproc.Attention(**sizes)
        self.attn2 = attnproc.Attention(**sizes, cross_attention_dim=24)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x)
        return x + self.attn2(x, encoder_hidden_states=text)


class Model(nn.Module):
    """Two blocks and an input for them: a batch of two, 4 x 4 tokens, 6 words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.x, self.text = torch.randn(2, 16, 32), torch.randn(2, 6, 24)

    def forward(self) -> Tensor:
        x = self.x
        for block in self.blocks:
            x = block(x, self.text)
        return x


def captured_by_hand(block: Block, x: Tensor, text: Tensor) -> Tensor:
    """Weights of a block's cross attention for all words, mean over heads, in float64."""
    x, attn = x + block.attn1(x), block.attn2
    q, k = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (attn.to_q(x), attn.to_k(text)))
    return plain_weights(q, k, Scoring()).mean(dim=1)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_maps_of_a_model_under_any_kernel(kernel: str) -> None:
    model = Model()
    for _, attn in processors(model):
        attn.processor._attention_backend = kernel
    before = model()

    with capture(model, {"red": 1, "heart": (2, 3)}) as maps:
        inside = model(), model()

    expected = captured_by_hand(model.blocks[0], model.x, model.text)[1:]
    found = maps.sums["blocks.0.attn2"]
    assert torch.equal(inside[0], before)
    assert torch.equal(inside[1], before)
    assert torch.equal(model(), before)
    assert maps.calls == {"blocks.0.attn2": 2, "blocks.1.attn2": 2}
    torch.testing.assert_close(found[..., 0].double(), 2 * expected[..., 1], rtol=0, atol=1e-5)
    heart = 2 * expected[..., 2:4].sum(dim=-1)
    torch.testing.assert_close(found[..., 1].double(), heart, rtol=0, atol=1e-5)
    assert maps["heart"].shape == (1, 4, 4)
    mean = sum(maps.sums.values()) / 4
    torch.testing.assert_close(maps.mean()[0, 1].flatten(), mean[0, :, 1])


@torch.no_grad()
def test_maps_of_sliced_attention_are_those_of_the_whole() -> None:
    model = Model()
    with capture(model, [0, 4], part=(0, 1)) as whole:
        model()
    for _, attn in processors(model):
        attn.set_processor(attnproc.SlicedAttnProcessor(3))

    with capture(model, [0, 4], part=(0, 1)) as sliced:
        model()

    torch.testing.assert_close(sliced.mean(), whole.mean())
    assert sliced.words == ["0", "4"]


@torch.no_grad()
def test_self_attention_and_all_keys() -> None:
    model = Model()

    with capture(model, kind="self", layers="blocks.1.*", part=(0, 1)) as maps:
        model()

    assert list(maps.sums) == ["blocks.1.attn1"]
    torch.testing.assert_close(maps.mean().sum(dim=1), torch.ones(2, 4, 4))


@torch.no_grad()
def test_joint_attention_gives_the_texts_share_of_the_images_queries() -> None:
    torch.manual_seed(0)
    attn = attnproc.Attention(
        query_dim=32, heads=4, dim_head=8, added_kv_proj_dim=24, context_pre_only=False
    )
    model = nn.ModuleList([attn])
    attn.set_processor(attnproc.JointAttnProcessor2_0())
    x, text = torch.randn(1, 16, 32), torch.randn(1, 6, 24)

    with capture(model, [1, 5], kind="joint", part=(0, 1)) as maps:
        attn(x, encoder_hidden_states=text)

    q = attn.to_q(x)
    k = torch.cat((attn.to_k(x), attn.add_k_proj(text)), dim=1)
    q, k = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k))
    expected = plain_weights(q, k, Scoring()).mean(dim=1)[..., [17, 21]]
    torch.testing.assert_close(maps.sums["0"].double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_processors_come_back_also_after_an_error() -> None:
    model = Model()
    before = [attn.processor for _, attn in processors(model)]

    message = r"words has positions \[6\], this layer has keys 0 to 5"
    with pytest.raises(ValueError, match=message), capture(model, {"none": 6}):
        model()

    assert all(a.processor is p for (_, a), p in zip(processors(model), before, strict=True))


@torch.no_grad()
def test_one_graph_under_compile() -> None:
    model = Model()
    for _, attn in processors(model):
        attn.set_processor(attnproc.AttnProcessor())
    with capture(model, [1]) as plain:
        before = model()

    with capture(model, [1]) as maps:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        inside = compiled(), compiled()

    assert all(torch.equal(output, before) for output in inside)
    assert set(maps.calls.values()) == {2}
    torch.testing.assert_close(maps.mean(), plain.mean())


OF_A_LAYER: dict[str, Callable[[int], Scoring]] = {
    "plain": lambda i: Scoring(),
    "keys": lambda i: Scoring(mask=Keys(torch.arange(KEYS) < torch.tensor([[5 - i], [7 - i]]))),
    "bias": lambda i: Scoring(mask=Bias(torch.randn(1, HEADS, QUERIES, KEYS))),
    "mixed": lambda i: Scoring(scale=0.2 + i // 2, causal=i == 1),
}


@pytest.mark.parametrize("each_step", [False, True])
@pytest.mark.parametrize("name", OF_A_LAYER)
@torch.no_grad()
def test_several_layers_and_steps(name: str, each_step: bool) -> None:
    """Of two shapes, in part with fewer key heads."""
    torch.manual_seed(0)
    maps = Maps({"a": 1, "b": (2, 4)}, (1, 2), each_step=each_step)
    parts = [Capture(maps, str(i)) for i in range(4)]
    expected: dict[str, list[Tensor]] = {}
    for _ in range(3):
        for i, part in enumerate(parts):
            key_heads = 2 if i == 3 else HEADS
            q, scoring = torch.randn(BATCH, HEADS, QUERIES, DIM), OF_A_LAYER[name](i)
            k, v = (torch.randn(BATCH, key_heads, KEYS, DIM) for _ in range(2))
            assert torch.equal(part(AUTO, q, k, v, scoring), AUTO(q, k, v, scoring))
            weights = plain_weights(q, k, scoring).mean(dim=1)[1:]
            both = torch.stack((weights[..., 1], weights[..., [2, 4]].sum(dim=-1)), dim=-1)
            expected.setdefault(str(i), []).append(both)

    assert maps.calls == dict.fromkeys(expected, 3)
    assert list(maps.taken) == list(expected)
    for layer, found in expected.items():
        want = found if each_step else [torch.stack(found).sum(dim=0)]
        for got, right in zip(maps.taken[layer], want, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=0, atol=1e-5)


def test_sums_over_calls_in_several_modes() -> None:
    model = Model()
    with torch.inference_mode(), capture(model, [1]) as maps:
        model()
    with capture(model, [1]) as twice:
        with torch.inference_mode():
            model()
        model()

    torch.testing.assert_close(twice.mean(), maps.mean())


@torch.no_grad()
def test_autocast_does_not_round_the_scores() -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 300, 8)
    maps = Maps([0, 3], (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for keys in (7, 300):
            Capture(maps, str(keys))(SDPA, q, k[:, :, :keys], k[:, :, :keys], Scoring())
        found = maps.sums

    for keys in (7, 300):
        expected = plain_weights(q, k[:, :, :keys], Scoring()).mean(dim=1)[..., [0, 3]]
        torch.testing.assert_close(found[str(keys)].double(), expected, rtol=0, atol=1e-5)


def test_gradients_are_those_without_capture() -> None:
    model = Model()
    model().sum().backward()
    weight = model.blocks[0].attn2.to_k.weight
    expected, weight.grad = weight.grad, None

    with capture(model, [0]) as maps:
        model().sum().backward()

    assert torch.equal(weight.grad, expected)
    assert not maps.mean().requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "nowhere.*"}, "matches no cross attention; there are: blocks.0.attn2"),
        ({"words": {}}, "words is empty"),
    ],
)
def test_what_cannot_be_captured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), capture(Model(), **options):
        pass


def test_a_batch_without_such_parts() -> None:
    model = Model()
    model.x, model.text = model.x[:1], model.text[:1]
    with pytest.raises(ValueError, match=r"part=\(0, 1\)"), capture(model, [0]):
        model()


def test_other_peoples_processors() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor2_0

    model = Model()
    model.blocks[1].attn2.set_processor(AttnProcessor2_0())
    before = model.blocks[0].attn2.processor

    with pytest.raises(ValueError, match=r"call attnproc\.swap"), capture(model):
        pass

    assert model.blocks[0].attn2.processor is before


def test_what_was_not_captured_is_said() -> None:
    maps = Maps({"red": 1})
    with pytest.raises(ValueError, match="captured with their queries: none"):
        maps.mean()
    with pytest.raises(KeyError, match="there are red"):
        maps["blue"]


def test_the_part_prints_compares_by_its_maps_and_pickles() -> None:
    maps = Maps({"red": 1})
    part = Capture(maps, "layer")

    assert part == Capture(maps, "layer")
    assert part != Capture(Maps({"red": 1}), "layer")
    assert pickle.loads(pickle.dumps(part)).maps.words == ["red"]
    assert "Maps(red; 0 layers)" in attnproc.AttnProcessor2_0().but(around=(part,)).describe()


@dataclass(frozen=True)
class Spy:
    """Keeps what a kernel gets and gives."""

    calls: list[tuple[Tensor, Tensor, Tensor, Scoring, Tensor]]

    def __call__(self, kernel: Any, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        o = kernel(q, k, v, scoring)
        self.calls.append((q, k, v, scoring, o))
        return o


def naive_weights(q: Tensor, k: Tensor, scoring: Scoring, linear: bool) -> Tensor:
    """All weights ``[B, H, Q, K]`` in float64, of softmax or of linear attention."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    mask = dense_mask(scoring, q, k)
    if linear:
        keys = torch.ones(())
        if mask is not None:
            keys = mask.double() if mask.dtype == torch.bool else mask.double().exp()
        weights = (q.relu() @ k.relu().transpose(-1, -2)) * keys
        return weights / (weights.sum(dim=-1, keepdim=True) + scoring.eps)
    scores = q @ k.transpose(-1, -2) * (scoring.scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    weights = scores.softmax(dim=-1).nan_to_num(0)
    return weights if scoring.keep is None else weights * scoring.keep.valid[:, None, :, None]


# Of every class the plainest configuration, and those with masks, fewer key heads and texts.
TOLD = {"bias", "bias_q", "keys", "bool3", "padded", "gqa", "text", "rope", "causal", "cross"}
CHOSEN = [c for c in CASES if c is FIRST[c.cls] or TOLD & set(c.id.split("-")[1:])]


@each(CHOSEN)
@pytest.mark.usefixtures("stand_ins")
@torch.no_grad()
def test_maps_equal_plain_attention_in_every_configuration(case: Any) -> None:
    setting = build(case, "ours", torch.float32, own_modules=True)
    plain, calls = setting.call(), []
    proc, maps = setting.processor, Maps(part=(0, 1))
    parts = (Capture(maps, "layer"), Spy(calls))
    # The outermost, where nothing is sliced or perturbed yet.
    setting.processor = proc.but(around=(*parts, *proc.recipe.around))

    found = setting.call()

    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    if not calls:
        pytest.skip("it has no kernel call here")
    q, k, v, scoring, o = calls[0]
    if scoring.mask is not None and len(scoring.mask[0]) not in (1, len(q)):
        rows = torch.arange(len(q)) % len(scoring.mask[0])
        scoring = scoring.but(mask=type(scoring.mask)(scoring.mask[0][rows]))
    linear = proc.recipe.kernel.linear
    expected = naive_weights(q, k, scoring, linear)
    if not proc.recipe.around:
        wide = expected @ v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        o = o if scoring.keep is None else o * scoring.keep.valid[:, None, :, None]
        torch.testing.assert_close(o.double(), wide, rtol=1e-4, atol=1e-5)
    for slab in ("image-text", "text-image", "image-image"):
        if slab == "text-image" and scoring.image is None:
            continue
        rows, cols = sides(slab, scoring, q.shape[2], k.shape[2])
        got = Maps(part=(0, 1), slab=slab).reduced(q, k, scoring, linear=linear).double()
        part = expected.mean(dim=1)[:, rows.start : rows.stop, cols.start : cols.stop]
        torch.testing.assert_close(got, part, rtol=0, atol=1e-5)
        if slab == "image-text":
            assert torch.equal(maps.sums["layer"].double(), got)


# One of each kind in the fast set, all others in the slow one.
SOON = {
    *("AttnProcessor2_0", "SlicedAttnProcessor", "CrossFrameAttnProcessor"),
    *("AttnAddedKVProcessor2_0", "IPAdapterAttnProcessor2_0", "PAGCFGJointAttnProcessor2_0"),
    *("FluxAttnProcessor2_0", "CogVideoXAttnProcessor2_0", "LuminaAttnProcessor2_0"),
    *(
        "MochiAttnProcessor2_0",
        "MochiVaeAttnProcessor2_0",
        "PAGIdentitySanaLinearAttnProcessor2_0",
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=cls, marks=[] if cls in SOON else pytest.mark.slow)
        for cls, case in FIRST.items()
    ],
)
@pytest.mark.usefixtures("stand_ins")
@torch.no_grad()
def test_every_class_is_captured_in_one_graph(case: Any) -> None:
    setting = build(case, "ours", torch.float32, own_modules=True)
    plain, proc = setting.call(), setting.processor
    eager, maps = Maps(part=(0, 1)), Maps(part=(0, 1))
    found: dict[str, Any] = {}
    for name, kept in (("eager", eager), ("compiled", maps)):
        setting.processor = proc.but(around=(Capture(kept, "layer"), *proc.recipe.around))
        call: Any = lambda: setting.processor(setting.attn, **setting.inputs)  # noqa: E731
        torch._dynamo.reset()
        run = torch.compile(call, backend="eager", fullgraph=True) if name == "compiled" else call
        out = run()
        found[name] = out if isinstance(out, tuple) else (out,)

    for out in found.values():
        # Rotary embedding rounds otherwise where it may change its result in place.
        for mine, other in zip(out, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert maps.calls == eager.calls
    for layer, expected in eager.sums.items():
        torch.testing.assert_close(maps.sums[layer], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_steps_heads_and_regions() -> None:
    model = Model()
    options: dict[str, Any] = {"part": (0, 1), "layers": "blocks.0.*"}

    with (
        capture(model, [0, 3], heads="each", each_step=True, **options) as each_head,
        capture(model, [0, 3], heads=(1, 2), steps=(1,), **options) as some,
        capture(model, kind="self", regions={"corner": Box(0, 0, 0.5, 0.5)}, **options) as corner,
    ):
        model()
        model()

    weights = each_head.taken["blocks.0.attn2"]
    assert [tuple(w.shape) for w in weights] == [(2, 4, 16, 2)] * 2
    torch.testing.assert_close(some.sums["blocks.0.attn2"], weights[1][:, 1:3].mean(dim=1))
    assert some.calls == {"blocks.0.attn2": 1}
    torch.testing.assert_close(
        each_head.mean(step=0, head=2)[:, 1].flatten(1), weights[0][:, 2, :, 1]
    )

    block = model.blocks[0]
    q, k = (
        layer(model.x).unflatten(-1, (4, 8)).transpose(1, 2)
        for layer in (block.attn1.to_q, block.attn1.to_k)
    )
    expected = plain_weights(q, k, Scoring()).mean(dim=1)[:, [0, 1, 4, 5]].mean(dim=1)
    torch.testing.assert_close(corner["corner"].flatten(1).double(), expected, atol=1e-6, rtol=0)


def test_boxes() -> None:
    assert Box(0, 0, 0.5, 1).tokens(2, 4) == [0, 1, 4, 5]
    assert Box.point(0.99, 0.6).tokens(2, 4) == [7]
    with pytest.raises(ValueError, match="fractions left <= right"):
        Box(0.5, 0, 0.2, 1)
    model, corner = Model(), {"a": Box.point(0, 0)}
    with (
        pytest.raises(ValueError, match="no grid of that aspect"),
        capture(model, kind="self", regions=corner, aspect=0.7),
    ):
        model()


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize("each_step", [False, True])
@torch.no_grad()
def test_maps_in_a_file_come_back(ending: str, each_step: bool, tmp_path: Path) -> None:
    model = Model()
    with capture(model, {"red": 1, "hot dog": (2, 3)}, each_step=each_step) as maps:
        model()
        model()

    maps.save(tmp_path / f"maps{ending}")
    back = load(tmp_path / f"maps{ending}")

    assert torch.equal(back.mean(), maps.mean())
    assert (back.words, back.calls) == (maps.words, maps.calls)
    with pytest.raises(ValueError, match="ends in"):
        maps.save("maps.csv")


@torch.no_grad()
def test_compiled_in_one_graph_for_all_steps() -> None:
    model = Model()
    expected = model()
    with capture(model, [0, 4], each_step=True, steps=(0, 2)) as eager:
        for _ in range(3):
            model()
    torch._dynamo.reset()

    with capture(model, [0, 4], each_step=True, steps=(0, 2)) as maps:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(), compiled()

    torch.testing.assert_close(out, expected)
    assert maps.calls == eager.calls
    torch.testing.assert_close(maps.mean(), eager.mean())


def naive_components(q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """By a singular value decomposition of the whole map, in float64."""
    whole = plain_weights(q, k, Scoring()).mean(dim=1)
    centred = whole - whole.mean(dim=1, keepdim=True)
    left, values, _ = torch.linalg.svd(centred)
    share = values.square() / values.square().sum(dim=-1, keepdim=True)
    return (left[..., :count] * values[:, None, :count]).transpose(1, 2), share[:, :count]


@torch.no_grad()
def test_components_are_those_of_the_whole_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("attnproc.capture.weights"), "_CHUNK", 1000)
    model = Model()
    model.x = model.x * 4
    before = model()

    with components(model, "blocks.0.*", step=1, part=(0, 1)) as found:
        inside = model(), model()

    q, k = found.pairs["blocks.0.attn1"]
    places, share = found.of("blocks.0.attn1", 3)
    expected, of_all = naive_components(q, k, 3)
    assert torch.equal(inside[1], before)
    torch.testing.assert_close(share.double(), of_all, rtol=1e-4, atol=0)
    places, expected = places.flatten(2).double(), expected
    signs = (places * expected).sum(dim=-1, keepdim=True).sign()
    torch.testing.assert_close(places * signs, expected, rtol=0, atol=1e-5)
    with pytest.raises(KeyError, match=r"there are blocks\.0\.attn1"):
        found.of("nowhere")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_kernels_own_log_sum_exp(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many keys the chosen ones alone are scored; the output is the same to the bit."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8).to(dtype) for n in (30, 300, 300))
    seen: list[Any] = []
    inner = Maps.reduced
    monkeypatch.setattr(
        Maps,
        "reduced",
        lambda s, q, k, c, lse, *rest: seen.append(lse) or inner(s, q, k, c, lse, *rest),
    )
    maps = Maps({"a": (3, 250), "b": 7}, part=(0, 1))
    part = partial(Capture(maps, "layer"), AUTO)
    run = torch.compile(part, fullgraph=True, backend="aot_eager") if compiled else part

    o = run(q, k, v, Scoring(scale=0.3))

    weights = plain_weights(q, k, Scoring(scale=0.3)).mean(dim=1)
    expected = torch.stack((weights[..., [3, 250]].sum(dim=-1), weights[..., 7]), dim=-1)
    assert torch.equal(o, AUTO(q, k, v, Scoring(scale=0.3)))
    assert seen[0] is not None
    torch.testing.assert_close(maps.sums["layer"].double(), expected, rtol=0, atol=1e-5)
