"""What only a GPU shows: kernels, log-sum-exps, compiled masks and memory; skipped without one."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CLASSES
from kernel_cases import ALL_DTYPES, HALF, check, draw_case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnproc
from attnproc.capture import Capture, Maps, capture
from attnproc.capture.fused import takes
from attnproc.capture.together import attended
from attnproc.kernels import AUTO, FLEX, SDPA, ask, registered
from attnproc.kernels.channel import worth_a_channel
from attnproc.kernels.fusing import use_fused
from attnproc.kernels.oracle import oracle
from attnproc.kernels.plan import pick
from attnproc.kernels.reference import REFERENCE
from attnproc.places import Box
from attnproc.steering import Nearby, Region, Regional
from attnproc.types import Bias, Causal, Keys, Mask, Scoring

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = "cuda"
TOLERANCE = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
KERNELS = [kernel for kernel in registered().values() if kernel != FLEX]


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=gen).to(DEVICE, dtype) for shape in shapes]


def close(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    allowed = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), right.double(), rtol=allowed, atol=allowed)


# Kernels


def equal_or_refused(kernel: Any, count: int, **limits: Any) -> Counter[str]:
    rng = random.Random(0)
    cases = (draw_case(rng.choice, ALL_DTYPES, DEVICE, **limits) for _ in range(count))
    return Counter(check(case, kernel) for case in cases)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_equal_the_oracle_or_refuse(kernel: Any) -> None:
    print(kernel.name, dict(equal_or_refused(kernel, 40)))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_equal_the_oracle_or_refuse_in_many_cases(kernel: Any) -> None:
    print(kernel.name, dict(equal_or_refused(kernel, 1000)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("heads", "dim"), [((8, 2), 72), ((4, 4), 40), ((4, 4), 64), ((4, 4), 120)]
)
@torch.no_grad()
def test_masks_over_keys_as_channels(heads: tuple[int, int], dim: int, compiled: bool) -> None:
    q, k, v = (
        t.transpose(1, 2) for t in drawn((2, 2050, heads[0], dim), *[(2, 2050, heads[1], dim)] * 2)
    )
    valid = torch.arange(2050, device=DEVICE) < torch.tensor([[1033], [0]], device=DEVICE)
    scoring = Scoring(mask=Keys(valid))
    torch._dynamo.reset()
    run = torch.compile(AUTO, fullgraph=True) if compiled else AUTO
    assert worth_a_channel(q, k, v, scoring)

    right, _ = oracle(q, k, v, Keys(valid))
    close(run(q, k, v, scoring), right, torch.bfloat16)


def test_flex_compiled_equals_the_oracle() -> None:
    # Every case is a compilation of its own.
    assert equal_or_refused(FLEX, 6, size=160, dims=(16, 64, 128))["equal"]


# Log-sum-exps for capture

SCALES = (None, 0.3)
BACKENDS = {
    "flash": (SDPBackend.FLASH_ATTENTION, HALF),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, HALF),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, (torch.float32, *HALF)),
}
PINNED = [(name, dtype) for name, (_, dtypes) in BACKENDS.items() for dtype in dtypes]


@pytest.mark.parametrize("kernel", [AUTO, SDPA], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize(("name", "dtype"), PINNED)
@torch.no_grad()
def test_log_sum_exps_of_torchs_operators(
    name: str, dtype: torch.dtype, dim: int, causal: bool, kernel: Any
) -> None:
    queries = 333 if causal else 200
    q, k, v = drawn((2, 4, queries, dim), (2, 4, 333, dim), (2, 4, 333, dim), dtype=dtype)
    for scale in SCALES:
        scoring = Scoring(causal=causal, scale=scale)
        with sdpa_kernel(BACKENDS[name][0]):
            o, lse = attended(kernel, q, k, v, scoring)
            plain = kernel(q, k, v, scoring)
        right, right_lse = oracle(q, k, v, Causal() if causal else None, scale=scale)
        assert torch.equal(o, plain)
        close(o, right, dtype)
        assert lse is not None
        assert lse.shape == right_lse.shape
        torch.testing.assert_close(lse.double(), right_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_maps_are_those_of_plain_attention(dtype: torch.dtype, compiled: bool) -> None:
    q, k, v = drawn((2, 4, 512, 64), (2, 4, 600, 64), (2, 4, 600, 64), dtype=dtype)
    maps = Maps({"a": (3, 250), "b": 7}, part=(0, 1))
    part = partial(Capture(maps, "layer"), AUTO)
    torch._dynamo.reset()
    run = torch.compile(part, fullgraph=True) if compiled else part
    plain = torch.compile(AUTO, fullgraph=True) if compiled else AUTO

    o = run(q, k, v, Scoring())

    assert torch.equal(o, plain(q, k, v, Scoring()))
    weights = (q.double() @ k.double().mT / 8).softmax(dim=-1).mean(dim=1)
    expected = torch.stack((weights[..., [3, 250]].sum(dim=-1), weights[..., 7]), dim=-1)
    torch.testing.assert_close(maps.sums["layer"].double(), expected, rtol=0, atol=1e-5)


MASKS: dict[str, Callable[[], Mask | None]] = {
    "no mask": lambda: None,
    "keys": lambda: Keys(
        torch.arange(77, device=DEVICE) < torch.tensor([[9], [60]], device=DEVICE)
    ),
    "bias": lambda: Bias(drawn((2, 1, 1, 77))[0]),
}


@pytest.mark.parametrize("dim", [40, 64, 160])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_maps_of_few_keys_are_those_of_plain_attention(
    dtype: torch.dtype, mask: str, dim: int
) -> None:
    q, k = (t.transpose(1, 2) for t in drawn((2, 1000, 5, dim), (2, 77, 5, dim), dtype=dtype))
    scoring, words = Scoring(mask=MASKS[mask]()), {"a": (3, 76), "b": 7}
    maps, apart = Maps(words, part=(1, 2)), Maps(words, part=(1, 2), each_step=True)
    for _ in range(2):
        for found in (maps, apart):
            found.add("layer", found.reduced(q, k, scoring, layer="layer"))

    # The kernel takes float32 at up to 64 channels.
    assert takes(q, k, scoring, 2) == (dtype in HALF or dim <= 64)
    scores = q.double() @ k.double().mT / dim**0.5
    if mask == "keys":
        scores = scores.masked_fill(~scoring.mask[0][:, None, None], -torch.inf)
    if mask == "bias":
        scores = scores + scoring.mask[0].double()
    weights = scores.softmax(dim=-1).mean(dim=1)[1:]
    expected = torch.stack((weights[..., [3, 76]].sum(dim=-1), weights[..., 7]), dim=-1)
    for each in apart.taken["layer"]:
        torch.testing.assert_close(each.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.sums["layer"].double(), 2 * expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_maps_of_a_model_are_the_composed_ones() -> None:
    torch.manual_seed(0)
    attn = attnproc.Attention(query_dim=128, heads=2, dim_head=64, cross_attention_dim=96)
    model = nn.ModuleDict({"attn": attn}).to(DEVICE, torch.bfloat16)
    x, text = drawn((2, 256, 128), (2, 77, 96))
    found: dict[bool, Tensor] = {}
    outs: list[Tensor] = [model["attn"](x, encoder_hidden_states=text)]
    for wanted in (True, False):
        use_fused(wanted)
        try:
            with capture(model, list(range(1, 11))) as maps:
                outs += [model["attn"](x, encoder_hidden_states=text) for _ in range(3)]
        finally:
            use_fused(True)
        found[wanted] = maps.mean()

    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-5)


@torch.no_grad()
def test_maps_take_no_memory_of_the_whole_map() -> None:
    q, k, v = drawn(*[(1, 24, 4608, 128)] * 3)
    dense = 24 * 4608 * 4608 * 2
    part = Capture(Maps(list(range(10)), part=(0, 1)), "layer")
    plain = peak(lambda: AUTO(q, k, v, Scoring()))
    captured = peak(lambda: part(AUTO, q, k, v, Scoring()))
    print(f"{plain / 2**20:.0f} MiB, with maps {captured / 2**20:.0f} MiB")
    assert captured < plain + dense / 8


# Masks of steering under compiled FlexAttention

TEXT, SIDE = 77, 16
TOKENS = SIDE * SIDE
LEFT, RIGHT = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
HARD = (Region(1, 9, LEFT), Region(9, 30, RIGHT), Region(30, 40, None))
SOFT = tuple(replace(region, soft=0.2) for region in HARD)
PARTS: dict[str, Any] = {
    "hard": Regional(HARD),
    "soft": Regional(SOFT),
    "isolated": Regional(HARD, isolate=True),
    "half": Regional(HARD, strength=0.5),
    "base": Regional(SOFT, strength=0.7, base=0.1),
    "nearby": Nearby(2),
}
SEQUENCES: dict[str, tuple[int, int, tuple[int, int] | None]] = {
    "cross": (TOKENS, TEXT, None),
    "self": (TOKENS, TOKENS, None),
    "behind": (TOKENS + TEXT, TOKENS + TEXT, (0, TOKENS)),
    "before": (TOKENS + TEXT, TOKENS + TEXT, (TEXT, TOKENS + TEXT)),
}


STEERED = [
    *((name, "cross") for name in ("hard", "soft", "half", "base")),
    ("nearby", "self"),
    *((name, where) for name in PARTS for where in ("behind", "before")),
]


# Each is a compilation of both passes, so a few are tried in single precision.
WIDE = [("soft", "cross"), ("hard", "behind"), ("nearby", "before")]


@pytest.mark.parametrize(
    ("name", "where", "dtype"),
    [
        *((*case, torch.bfloat16) for case in STEERED),
        *((*case, torch.float32) for case in WIDE),
    ],
)
def test_steering_under_compiled_flex(name: str, where: str, dtype: torch.dtype) -> None:
    queries, keys, image = SEQUENCES[where]
    scoring = Scoring(image=image, image_keys=image)
    leaves = drawn((2, 4, queries, 64), (2, 4, keys, 64), (2, 4, keys, 64), dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]

    found = PARTS[name](FLEX, *leaves, scoring)
    right = PARTS[name](REFERENCE, *wide, scoring)

    close(found, right, dtype)
    upstream = drawn(tuple(right.shape), dtype=dtype)[0]
    grads = torch.autograd.grad(found, leaves, upstream)
    wanted = torch.autograd.grad(right, wide, upstream.double())
    for got, want in zip(grads, wanted, strict=True):
        close(got, want, dtype)


class Joint(nn.Module):
    """Joint attention over 64 x 64 tokens and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = attnproc.Attention(
            query_dim=128, heads=2, dim_head=64, added_kv_proj_dim=128, context_pre_only=False
        )
        self.attn.set_processor(attnproc.JointAttnProcessor2_0())

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn(x, encoder_hidden_states=text)


@torch.no_grad()
def test_regions_in_a_compiled_model_with_many_tokens() -> None:
    torch.manual_seed(0)
    model = Joint().to(DEVICE, torch.bfloat16)
    attnproc.on(model, kind="joint").with_regions(*HARD)
    x, text = drawn((1, 4096, 128), (1, TEXT, 128))
    q = torch.empty(1, 2, 4096 + TEXT, 64, device=DEVICE, dtype=torch.bfloat16)
    mods: Any = (lambda b, h, i, j: i == j,)
    assert pick(ask(q, q, q, Scoring(mods=mods))) is FLEX
    torch._dynamo.reset()

    eager = model(x, text)
    compiled = torch.compile(model, fullgraph=True)(x, text)
    with capture(model, [1], kind="joint", part=(0, 1)) as maps:
        model(x, text)

    wide = Joint().to(DEVICE).double()
    wide.load_state_dict(model.state_dict())
    attnproc.on(wide, kind="joint").with_regions(*HARD).with_backend("reference")
    for side, right in enumerate(wide(x.double(), text.double())):
        close(eager[side], right, torch.bfloat16)
        close(compiled[side], right, torch.bfloat16)
    assert maps.mean()[0, 0, :, 32:].abs().max() == 0


# Memory


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that a call takes beyond what is held."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


try:
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from rows import ROWS, make

    from attnproc.verify.references import reference
except ImportError:
    ROWS = []

# Classes that no row has, with the row whose shapes they run at and their own arguments.
_LORA = {"hidden_size": 640, "cross_attention_dim": 2048, "rank": 16}
SIBLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "AttnAddedKVProcessor": ("kandinsky-addedkv-1024", {}),
    "SlicedAttnAddedKVProcessor": ("kandinsky-addedkv-1024", {"slice_size": 4}),
    "LoRAAttnAddedKVProcessor": (
        "kandinsky-addedkv-1024",
        {"hidden_size": 768, "cross_attention_dim": 768, "rank": 16},
    ),
    "LoRAAttnProcessor": ("sdxl-cross-4096x77", _LORA),
    "LoRAAttnProcessor2_0": ("sdxl-cross-4096x77", _LORA),
    "CustomDiffusionAttnProcessor": ("sdxl-custom-diffusion", {}),
    "IPAdapterAttnProcessor": ("sdxl-ip-cross-4096", {}),
    "PAGIdentitySelfAttnProcessor2_0": ("sdxl-self-4096", {}),
    "FusedAuraFlowAttnProcessor2_0": ("auraflow-4096+256", {}),
    "FusedCogVideoXAttnProcessor2_0": ("cogvideox5b-17550+226", {}),
    "FusedHunyuanAttnProcessor2_0": ("hunyuandit-self-4096", {}),
    "PAGHunyuanAttnProcessor2_0": ("hunyuandit-self-4096", {}),
    "PAGIdentitySanaLinearAttnProcessor2_0": ("sana-linear-16384", {}),
}
# Their packages are not here: what a stand-in takes says nothing.
ELSEWHERE = ("XFormers", "NPU", "XLA")


def all_rows() -> list[Any]:
    named = {row.name: row for row in ROWS}
    more = [
        replace(
            named[name],
            name=f"{name}-{cls}",
            cls=cls,
            init=init or named[name].init,
            fuse=cls.startswith("Fused"),
        )
        for cls, (name, init) in SIBLINGS.items()
        if name in named
    ]
    return [*ROWS, *more]


def test_every_class_has_a_row() -> None:
    pytest.importorskip("diffusers")
    missing = set(CLASSES) - {row.cls for row in all_rows()}
    assert [cls for cls in missing if not any(name in cls for name in ELSEWHERE)] == []


# Half of a percent and 2 MiB are left to the allocator's rounding.
@pytest.mark.parametrize("row", all_rows(), ids=lambda row: row.name)
@torch.no_grad()
def test_peak_memory_is_at_most_diffusers(row: Any) -> None:
    pytest.importorskip("diffusers")
    setting = make(row, DEVICE, torch.bfloat16)
    theirs = reference(row.cls, row.init)
    ours = getattr(attnproc, row.cls)(**row.init)
    if isinstance(theirs, nn.Module):
        theirs.to(DEVICE, torch.bfloat16)
        ours.__dict__["_modules"] = dict(theirs.named_children())
    mine, his = (peak(lambda p=p: p(setting.attn, **setting.inputs)) for p in (ours, theirs))
    print(f"{row.name}: {mine / 2**20:.1f} MiB, diffusers {his / 2**20:.1f} MiB")
    assert mine <= 1.005 * his + 2 * 2**20, f"{mine / 2**20:.1f} of {his / 2**20:.1f} MiB"
