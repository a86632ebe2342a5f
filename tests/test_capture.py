"""Captured maps are those of plain attention, and capturing changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnproc
from attnproc.capture import Capture, Maps, capture, key_weights
from attnproc.interop import processors
from attnproc.types import Bias, Keys, Scoring

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
    monkeypatch.setattr(import_module("attnproc.capture"), "_CHUNK", chunk)
    torch.manual_seed(0)
    q, k = torch.randn(BATCH, HEADS, QUERIES, DIM), torch.randn(BATCH, key_heads, KEYS, DIM)
    scoring, chosen = SCORINGS[name](), torch.tensor([5, 0, 2])

    found = key_weights(q, k, chosen, scoring)

    expected = plain_weights(q, k, scoring)[..., chosen].mean(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_exact_for_the_queries_and_keys_as_they_are(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 2, 5, DIM).to(dtype), torch.randn(1, 2, KEYS, DIM).to(dtype)

    found = key_weights(q, k, torch.arange(KEYS), Scoring())

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
