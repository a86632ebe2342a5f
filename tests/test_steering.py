"""Each steering part against the map written out in float64, and together with the others."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import attnproc
from attnproc.capture import Capture, Maps, capture
from attnproc.kernels import CHUNKED, REFERENCE, SDPA
from attnproc.kernels.around import Perturbed
from attnproc.places import Box
from attnproc.steering import (
    Alignment,
    BlurredQueries,
    Fading,
    Nearby,
    PromptToPrompt,
    Region,
    Regional,
    SharedKeys,
    TextBefore,
    WordWeights,
    align,
    parse,
)
from attnproc.types import Arranged, Bias, Call, Keys, Scoring, Site

B, H, S, T, D, SIDE = 4, 2, 16, 6, 8, 4
KERNELS = [REFERENCE, SDPA, CHUNKED]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> Any:
    return request.param


def drawn(queries: int = S, keys: int = T) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, H, n, D, dtype=torch.float64) for n in (queries, keys, keys))


def map_of(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """The whole map, written out."""
    return (q @ k.transpose(-1, -2) * D**-0.5 + bias).softmax(dim=-1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# Where a joint sequence has its text: nowhere, behind the image, before it.
JOINT = {"behind": (slice(0, S), slice(S, S + T)), "before": (slice(T, S + T), slice(0, T))}


def joint_scoring(where: str) -> Scoring:
    image = JOINT[where][0]
    return Scoring(image=(image.start, image.stop), image_keys=(image.start, image.stop))


# Word weights


def weighted(part: WordWeights, v: Tensor, text_first: bool, text: int, context: bool) -> Tensor:
    recipe = attnproc.AttnProcessor2_0().recipe.but(text_first=text_first)
    call = Call(v, context=v if context else None)
    arranged = Arranged(v, v, v, length=v.shape[2], text_keys=text)
    return part(Site(recipe, None, None, call), arranged, v, v)[1]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_word_weights_multiply_columns_of_the_map(kernel: Any, strength: float) -> None:
    q, k, v = drawn()
    part = WordWeights(((1, 1.4), (4, -0.5)), strength=strength)

    found = kernel(q, k, weighted(part, v, False, 0, True), Scoring())

    factors = torch.tensor([1, 1.4, 1, 1, -0.5, 1], dtype=torch.float64)
    expected = map_of(q, k)
    expected[2:] *= 1 + strength * (factors - 1)
    close(found, expected @ v)


def test_word_weights_in_joint_and_in_self_attention() -> None:
    v = drawn(S + T, S + T)[2]
    part = WordWeights(((0, 2.0),), part=(0, 1))
    for text_first, column in ((True, 0), (False, S)):
        expected = v.clone()
        expected[:, :, column] *= 2
        close(weighted(part, v, text_first, T, True), expected)
    assert weighted(part, v, False, 0, False) is v
    with pytest.raises(ValueError, match=r"positions \[9\], the prompt has tokens 0 to 5"):
        weighted(WordWeights(((9, 2.0),)), v, True, T, True)


def test_weights_in_prompts() -> None:
    found = parse("a (red:1.4) heart (on a hill: -1)")
    assert found.text == "a red heart on a hill"
    assert [found.text[a:b] for a, b, _ in found.spans] == ["red", "on a hill"]
    assert [weight for *_, weight in found.spans] == [1.4, -1.0]
    assert parse("plain (as it is)").text == "plain (as it is)"
    with pytest.raises(ValueError, match=r"give a number, as in \(red:1.4\)"):
        parse("(red:more)")


# Regions

LEFT, RIGHT = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)


def naive_shares(regions: tuple[Region, ...], soft: bool) -> list[Tensor]:
    """How far each token is in each region, token by token."""
    shares = []
    for region in regions:
        share = torch.zeros(S, dtype=torch.float64)
        for at in range(S if region.box else 0):
            x, y = (at % SIDE + 0.5) / SIDE, (at // SIDE + 0.5) / SIDE
            box, depths = region.box, []
            for place, edge, sign in (
                (x, box.left, 1), (x, box.right, -1), (y, box.top, 1), (y, box.bottom, -1),
            ):  # fmt: skip
                if edge not in (0, 1):
                    depths.append((place - edge) * sign)
            depth = min(depths, default=1)
            share[at] = min(max(depth / region.soft + 0.5, 0), 1) if soft else float(depth >= 0)
        shares.append(share)
    rest = torch.stack([1 - s for r, s in zip(regions, shares, strict=True) if r.box]).amin(dim=0)
    return [s if r.box else rest for r, s in zip(regions, shares, strict=True)]


def naive_regions(regions: tuple[Region, ...], soft: bool, isolate: bool, where: str) -> Tensor:
    """How far keys are seen, over the queries and keys."""
    total = S + T if where else 0
    image, text = JOINT.get(where, (slice(0, S), slice(0, T)))
    seen = torch.ones(total or S, total or T, dtype=torch.float64)
    owner = {i: n for n, r in enumerate(regions) for i in range(r.start, r.stop)}
    shares = naive_shares(regions, soft)
    for token, n in owner.items():
        seen[image, text.start + token] = shares[n]
        if where:
            seen[text.start + token, image] = shares[n]
            for other, m in owner.items():
                if m != n:
                    seen[text.start + token, text.start + other] = 0
    if isolate:
        for share in shares:
            for i in range(S):
                for j in range(S):
                    at = (image.start + i, image.start + j)
                    seen[at] = min(seen[at], 1 - share[i] * (1 - share[j]))
    return seen


@pytest.mark.parametrize("where", ["", "behind", "before"])
@pytest.mark.parametrize("soft", [0.0, 0.6])
@pytest.mark.parametrize("isolate", [False, True])
def test_regions(kernel: Any, where: str, soft: float, isolate: bool) -> None:
    if isolate and not where:
        pytest.skip("cross attention has no keys of the picture")
    regions = (
        Region(1, 3, LEFT, soft),
        Region(3, 4, Box(0.5, 0.5, 1, 1), soft),
        Region(4, 6, None),
    )
    q, k, v = drawn(S + T, S + T) if where else drawn()
    scoring = joint_scoring(where) if where else Scoring()

    found = Regional(regions, isolate)(kernel, q, k, v, scoring)

    seen = naive_regions(regions, bool(soft), isolate, where)
    torch.testing.assert_close(found, map_of(q, k, seen.log()) @ v, rtol=0, atol=1e-6)


def test_regions_of_half_strength_and_with_a_mask() -> None:
    q, k, v = drawn()
    valid = Keys(torch.arange(T) < torch.tensor([[5], [6], [6], [6]]))
    part = Regional((Region(1, 3, LEFT), Region(3, 6, RIGHT)), strength=0.3)

    found = part(REFERENCE, q, k, v, Scoring(mask=valid))

    seen = 0.7 + 0.3 * naive_regions(part.regions, False, False, "")
    bias = seen.log().masked_fill(~valid.valid[:, None, None], -torch.inf)
    torch.testing.assert_close(found, map_of(q, k, bias) @ v, rtol=0, atol=1e-6)
    assert torch.equal(
        Regional(part.regions, strength=0.0)(REFERENCE, q, k, v, Scoring()),
        REFERENCE(q, k, v, Scoring()),
    )


@pytest.mark.parametrize("where", ["", "behind", "before"])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("soft", [0.0, 0.6])
def test_a_base_prompt_lays_out_the_whole(
    kernel: Any, soft: float, strength: float, where: str
) -> None:
    regions = (Region(0, 2, None), Region(2, 4, LEFT, soft), Region(4, 6, RIGHT, soft))
    q, k, v = drawn(S + T, S + T) if where else drawn()
    scoring = joint_scoring(where) if where else Scoring()
    image, text = JOINT.get(where, (slice(0, S), slice(0, T)))

    found = Regional(regions, strength=strength, base=0.2)(kernel, q, k, v, scoring)

    seen = naive_regions(regions, bool(soft), False, where)
    first = slice(text.start, text.start + 2)
    rest = naive_shares(regions, bool(soft))[0].clamp(min=0.2)
    seen[image, first] = rest[:, None]
    plain = torch.ones_like(seen)
    plain[:, text.start + 2 : text.stop] = 0
    if where:
        seen[first, image] = rest
        for low in (2, 4):
            own = slice(text.start + low, text.start + low + 2)
            plain[own, own] = 1
    shown = (1 - strength) * plain + strength * seen
    torch.testing.assert_close(found, map_of(q, k, shown.log()) @ v, rtol=0, atol=1e-6)
    if strength == 0:
        # The picture is that of the base prompt alone.
        some = [i for i in range(k.shape[2]) if not text.start + 2 <= i < text.stop]
        alone = map_of(q[:, :, image], k[:, :, some]) @ v[:, :, some]
        torch.testing.assert_close(found[:, :, image], alone, rtol=0, atol=1e-6)


def test_a_region_beyond_the_text() -> None:
    with pytest.raises(ValueError, match="regions reach token 8, the text has 6 tokens"):
        Regional((Region(1, 9, LEFT),))(REFERENCE, *drawn(), Scoring())


# Prompt-to-prompt


def test_alignments() -> None:
    same = align(["a", "red", "heart"], ["a", "blue", "heart"], length=6)
    assert same == Alignment(
        ((0, 0, 1.0), (1, 1, 1.0), (2, 2, 1.0), (3, 3, 1.0), (4, 4, 1.0), (5, 5, 1.0))
    )
    longer = align(["cat"], ["big", "dog"], length=5)
    assert longer.pairs == ((0, 0, 1.0), (1, 1, 0.5), (1, 2, 0.5), (2, 3, 1.0), (3, 4, 1.0))
    added = align(["a", "heart"], ["a", "red", "heart"], length=6)
    assert (1, 1, 1.0) in added.pairs
    assert (2, 3, 1.0) in added.pairs
    assert added.new == (2,)
    own = align(["red"], ["blue"], replaced="own")
    assert own == Alignment(((0, 0, 1.0),), (1,))


ALIGNED = {
    "replace": align(["a", "b", "c"], ["a", "d", "c"], length=T),
    "longer": align(["a", "b"], ["a", "d", "e"], length=T),
    "refine": align(["a", "c"], ["a", "b", "c"], length=T),
    "own": align(["a", "b", "c"], ["a", "d", "c"], replaced="own", length=T),
}


def naive_edit(
    q: Tensor, k: Tensor, v: Tensor, text: slice, alignment: Alignment | None
) -> Tensor:
    """Row 3 of the batch takes its map from row 2, by columns."""
    maps = map_of(q, k)
    edited, source = maps[3].clone(), maps[2]
    if alignment is None:
        edited = source
    else:
        outside = [i for i in range(k.shape[2]) if not text.start <= i < text.stop]
        edited[..., outside] = source[..., outside]
        aligned = {j for _, j, _ in alignment.pairs}
        for j in range(T):
            if j in aligned:
                edited[..., text.start + j] = sum(
                    share * source[..., text.start + i]
                    for i, jj, share in alignment.pairs
                    if jj == j
                )
            else:
                assert j in alignment.new
    maps[3] = edited
    return maps @ v


@pytest.mark.parametrize("where", ["", "behind", "before"])
@pytest.mark.parametrize("name", [*ALIGNED, None])
def test_prompt_to_prompt(kernel: Any, name: str | None, where: str) -> None:
    alignment = ALIGNED.get(name)
    q, k, v = drawn(S + T, S + T) if where else drawn()
    scoring = joint_scoring(where) if where else Scoring()
    text = JOINT.get(where, (None, slice(0, T)))[1]

    found = PromptToPrompt(alignment)(kernel, q, k, v, scoring)

    expected = naive_edit(q, k, v, text, alignment)
    close(found, expected)
    half = PromptToPrompt(alignment, strength=0.25)(kernel, q, k, v, scoring)
    close(half, 0.75 * (map_of(q, k) @ v) + 0.25 * expected)


def test_prompt_to_prompt_takes_the_sources_mask() -> None:
    q, k, v = drawn()
    bias = torch.randn(B, H, S, T, dtype=torch.float64)

    found = PromptToPrompt()(REFERENCE, q, k, v, Scoring(mask=Bias(bias)))

    close(found[3], map_of(q[2], k[2], bias[2]) @ v[3])


# Reference


@pytest.mark.parametrize("where", ["", "behind", "before"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_reference(kernel: Any, mode: Any, strength: float, where: str) -> None:
    q, k, v = drawn(S + T, S + T) if where else drawn(S, S)
    scoring = joint_scoring(where) if where else Scoring()
    image = JOINT[where][0] if where else slice(0, S)

    found = SharedKeys(mode, strength=strength)(kernel, q, k, v, scoring)

    expected = map_of(q, k) @ v
    for row in range(B):
        first = row - row % 2
        if row == first:
            continue
        if mode == "append":
            keys = torch.cat((k[row], k[first, :, image]), dim=1)
            values = torch.cat((v[row], v[first, :, image]), dim=1)
            bias = torch.zeros(keys.shape[1], dtype=torch.float64)
            bias[k.shape[2] :] = torch.tensor(strength).log()
            expected[row] = map_of(q[row], keys, bias) @ values
        else:
            keys, values = k[row].clone(), v[row].clone()
            keys[:, image], values[:, image] = k[first, :, image], v[first, :, image]
            shared = map_of(q[row], keys) @ values
            expected[row] = (1 - strength) * expected[row] + strength * shared
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if strength != 1 else 1e-10)
    close(found[::2], (map_of(q, k) @ v)[::2])


def test_reference_with_masks_and_norms() -> None:
    q, k, v = drawn(S, S)
    valid = torch.rand(B, S) > 0.3
    found = SharedKeys()(REFERENCE, q, k, v, Scoring(mask=Keys(valid)))
    keys, values = torch.cat((k[3], k[2]), 1), torch.cat((v[3], v[2]), 1)
    seen = torch.cat((valid[3], valid[2]))
    bias = torch.zeros(2 * S).double().masked_fill(~seen, -torch.inf)
    close(found[3], map_of(q[3], keys, bias) @ values)

    found = SharedKeys(normed=True)(REFERENCE, q, k, v, Scoring())
    q3, k3 = (
        (t[3] - t[3].mean(1, True)) / (t[3].std(1, keepdim=True) + 1e-5)
        * (t[2].std(1, keepdim=True) + 1e-5) + t[2].mean(1, True)
        for t in (q, k)
    )  # fmt: skip
    close(found[3], map_of(q3, torch.cat((k3, k[2]), 1)) @ values)

    with pytest.raises(ValueError, match="one of positions"):
        SharedKeys()(REFERENCE, q, k, v, Scoring(causal=True))


# Perturbations


@pytest.mark.parametrize("where", ["", "behind", "before"])
@pytest.mark.parametrize("sigma", [1.0, float("inf")])
def test_smoothed_energy(kernel: Any, sigma: float, where: str) -> None:
    q, k, v = drawn(S + T, S + T) if where else drawn(S, S)
    scoring = joint_scoring(where) if where else Scoring()
    image = JOINT[where][0] if where else slice(0, S)

    found = Perturbed(2, BlurredQueries(sigma))(kernel, q, k, v, scoring)

    # The scores themselves are blurred here, over the queries' grid.
    scores = q @ k.transpose(-1, -2) * D**-0.5
    blur = torch.full((S, S), 1 / S, dtype=torch.float64)
    if sigma == 1:
        line = torch.zeros(SIDE, SIDE, dtype=torch.float64)
        bell = torch.exp(-0.5 * torch.arange(-3.0, 4).double() ** 2)
        bell = bell / bell.sum()
        for i in range(SIDE):
            for offset in range(-3, 4):
                at = abs(i + offset)
                line[i, at if at < SIDE else 2 * (SIDE - 1) - at] += bell[offset + 3]
        blur = torch.kron(line, line)
    scores[2:, :, image] = blur @ scores[2:, :, image]
    close(found, scores.softmax(dim=-1) @ v)


@pytest.mark.parametrize("where", ["", "behind", "before"])
def test_a_sliding_window(kernel: Any, where: str) -> None:
    q, k, v = drawn(S + T, S + T) if where else drawn(S, S)
    scoring = joint_scoring(where) if where else Scoring()
    start = JOINT[where][0].start if where else 0

    found = Perturbed(2, Nearby(1))(kernel, q, k, v, scoring)

    bias = torch.zeros(B, 1, q.shape[2], k.shape[2], dtype=torch.float64)
    for i in range(S):
        for j in range(S):
            if max(abs(i // SIDE - j // SIDE), abs(i % SIDE - j % SIDE)) > 1:
                bias[2:, :, start + i, start + j] = -torch.inf
    close(found, map_of(q, k, bias) @ v)


# On processors and models

PARTS: dict[str, Callable[[attnproc.Layers], Any]] = {
    "words": lambda on: on.with_word_weights({1: 1.5}, part=(0, 1)),
    "regions": lambda on: on.with_regions(Region(1, 3, LEFT), Region(3, 5, RIGHT, 0.3)),
    "prompt_to_prompt": lambda on: on.with_prompt_to_prompt(
        ALIGNED["refine"], self_strength=0.5, part=(0, 1)
    ),
    "reference": lambda on: on.with_reference(parts=1),
    "pag": lambda on: attnproc.on(on.model, kind="self").with_pag(perturb=BlurredQueries()),
    "slicing": lambda on: on.with_slicing(1),
}


class Model(torch.nn.Module):
    """Self attention, then cross attention, over 4 x 4 tokens and 6 words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"query_dim": 16, "heads": 2, "dim_head": 8}
        self.attn1 = attnproc.Attention(**sizes)
        self.attn2 = attnproc.Attention(**sizes, cross_attention_dim=12)
        self.x, self.text = torch.randn(2, S, 16), torch.randn(2, T, 12)

    def forward(self) -> Tensor:
        x = self.x + self.attn1(self.x)
        return x + self.attn2(x, encoder_hidden_states=self.text)


@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("first", PARTS)
@torch.no_grad()
def test_parts_commute_and_come_off(first: str, second: str) -> None:
    if first == second:
        pytest.skip("one of a kind")
    outs = []
    for order in ((first, second), (second, first)):
        model = Model()
        plain = model()
        for name in order:
            PARTS[name](attnproc.on(model))
        outs.append(model())
        for name in order:
            attnproc.on(model).without(name, missing=True)
        assert torch.equal(model(), plain)
    torch.testing.assert_close(outs[0], outs[1])
    assert not torch.allclose(outs[0], plain)


@torch.no_grad()
def test_all_at_once_compiled_in_one_graph_with_schedules() -> None:
    model = Model()
    on = attnproc.on(model)
    early = on.schedule(1.0, 0.0, 0.5)
    on.with_word_weights({1: 1.5}, part=(0, 1), strength=early)
    on.with_regions(Region(1, 3, LEFT), Region(3, 5, RIGHT, 0.3), strength=early)
    on.with_prompt_to_prompt(ALIGNED["refine"], part=(0, 1), strength=early, self_strength=early)
    on.with_reference(parts=1, strength=early)
    plain = Model()()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    for time in (0.0, 0.6):
        on.clock.set(time)
        eager = model()
        torch.testing.assert_close(compiled(), eager)
        assert torch.allclose(eager, plain) == (time > 0.5)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_perturbation_by_strength(kernel: Any, strength: float) -> None:
    q, k, v = drawn(S, S)
    found = Perturbed(2, Fading(Nearby(1), strength))(kernel, q, k, v, Scoring())
    plain, near = map_of(q, k) @ v, Perturbed(2, Nearby(1))(REFERENCE, q, k, v, Scoring())
    close(found, (1 - strength) * plain + strength * near)


@torch.no_grad()
def test_perturbation_and_cross_frames_by_schedule_in_one_graph() -> None:
    verbs: tuple[Callable[..., Any], ...] = (
        lambda on, **strength: on.with_pag(2, **strength),
        lambda on, **strength: on.with_cross_frame(1, **strength),
    )
    for verb in verbs:
        model, steered, faded, mixture = Model(), Model(), Model(), Model()
        verb(attnproc.on(steered, kind="self"))
        on = attnproc.on(faded, kind="self")
        verb(on, strength=on.schedule(1.0, 0.0, 0.5))
        verb(attnproc.on(mixture, kind="self"), strength={"attn1": 0.5})
        torch._dynamo.reset()
        compiled = torch.compile(faded, fullgraph=True, backend="aot_eager")

        for time, expected in ((0.0, steered()), (0.6, model())):
            on.clock.set(time)
            torch.testing.assert_close(faded(), expected)
            torch.testing.assert_close(compiled(), expected)
        assert not torch.allclose(mixture(), model())
        assert not torch.allclose(mixture(), steered())
        verb(attnproc.on(mixture), strength={"nowhere": 1.0})


@torch.no_grad()
def test_scheduled_regions_leave_the_base_prompt_in_one_graph() -> None:
    model, base = Model(), Model()
    on = attnproc.on(model)
    regions = (Region(0, 2, None), Region(2, 4, LEFT), Region(4, 6, RIGHT, 0.3))
    on.with_regions(*regions, strength=on.schedule(1.0, 0.0, 0.5), base=0.1)
    base.text = base.text[:, :2]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    for time in (0.0, 0.6):
        on.clock.set(time)
        eager = model()
        torch.testing.assert_close(compiled(), eager)
        assert torch.allclose(eager, base(), atol=1e-5) == (time > 0.5)


@torch.no_grad()
def test_strengths_by_layer() -> None:
    model = Model()
    attnproc.on(model).with_word_weights({1: 3.0}, part=(0, 1), strength={"nowhere": 1.0})
    assert "words" not in model.attn2.processor.names()
    attnproc.on(model).with_word_weights({1: 3.0}, part=(0, 1), strength={"attn2": 0.5, "*": 1})
    assert model.attn2.processor.recipe.edits[0].strength == 0.5
    assert "words" not in model.attn1.processor.names()


@torch.no_grad()
def test_capture_sees_what_steering_makes_of_a_call_once() -> None:
    model = Model()
    attnproc.on(model).with_prompt_to_prompt(ALIGNED["refine"], part=(0, 1), strength=0.5)
    with capture(model, part=(0, 1)) as maps:
        model()
    assert maps.calls == {"attn2": 1}
    weights = maps.sums["attn2"]
    close(weights[0].double(), weights[1].double())


def test_a_text_that_stands_in_the_sequence(kernel: Any) -> None:
    q, k, v = drawn(S + T, S + T)
    regional = Regional((Region(1, 3, LEFT), Region(3, 5, RIGHT)))
    known = regional(kernel, q, k, v, joint_scoring("before"))

    found = TextBefore(T)(partial(regional, kernel), q, k, v, Scoring())

    close(found, known)
    behind = TextBefore(T)(partial(regional, kernel), q, k, v, joint_scoring("behind"))
    close(behind, regional(kernel, q, k, v, joint_scoring("behind")))
    with pytest.raises(ValueError, match="has 22 tokens, of which the first 22 are text"):
        TextBefore(S + T)(kernel, q, k, v, Scoring())


@torch.no_grad()
def test_maps_of_single_stream_blocks() -> None:
    pytest.importorskip("diffusers")
    from tiny_models import built

    model, inputs = built("flux")
    attnproc.swap(model)
    text = inputs["encoder_hidden_states"].shape[1]
    image = inputs["hidden_states"].shape[1]
    plain = model(**inputs, return_dict=False)[0]
    attnproc.on(model).with_text(text)

    with capture(model, [0, 2], kind="joint", part=(0, 1)) as maps:
        assert torch.equal(model(**inputs, return_dict=False)[0], plain)

    assert any(path.startswith("single") for path in maps.sums)
    assert {found.shape[1:] for found in maps.sums.values()} == {(image, 2)}
    attnproc.on(model).without("text")


def test_parts_pickle_compare_and_print() -> None:
    parts = (
        WordWeights(((1, 1.5),)),
        Regional((Region(1, 3, LEFT),)),
        PromptToPrompt(ALIGNED["refine"]),
        SharedKeys(),
        BlurredQueries(),
        Nearby(),
    )
    assert pickle.loads(pickle.dumps(parts)) == parts
    assert "WordWeights(weights=((1, 1.5),)" in repr(parts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SharedKeys("beside"), "possible are 'append' and 'replace'"),
        (lambda: BlurredQueries(0), "numbers above 0"),
        (lambda: Nearby(-1), "from 0 on"),
        (lambda: Region(3, 3, None), "no tokens"),
        (lambda: Region(1, 3, None, -1), "widths from 0 on"),
        (lambda: Regional((Region(1, 3, LEFT),), base=0.1), "a region without a box"),
        (lambda: Regional((Region(1, 3, None),), base=2), "numbers from 0 to 1"),
    ],
)
def test_what_is_not_possible(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_capture_is_inside_of_steering() -> None:
    proc = attnproc.AttnProcessor2_0().with_capture(Capture(Maps(), "a")).with_slicing(1)
    proc = proc.with_regions(Region(1, 3, LEFT)).with_reference()
    names = [part.name for part in proc.recipe.around]
    assert names == ["reference", "regions", "capture", "slicing"]
