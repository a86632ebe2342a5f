"""Our attention modules against diffusers': arguments, attributes, state dicts, norms, errors."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnproc import attention, modules
from attnproc.attention import Attention, MochiAttention, SanaMultiscaleLinearAttention

theirs: ModuleType | None
try:
    import diffusers.models.attention_processor as theirs
    import diffusers.models.normalization as their_norms
    from diffusers.models.transformers.transformer_flux import FluxAttention
except ImportError:
    theirs = None

needs_diffusers = pytest.mark.skipif(theirs is None, reason="diffusers isn't installed")

SMALL: dict[str, Any] = {"query_dim": 32, "heads": 4, "dim_head": 8}
JOINT: dict[str, Any] = {**SMALL, "added_kv_proj_dim": 24, "context_pre_only": False}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "bias": {**SMALL, "bias": True, "out_bias": False},
    "cross": {**SMALL, "cross_attention_dim": 48, "dropout": 0.1, "upcast_softmax": True},
    "gqa": {**SMALL, "kv_heads": 2, "upcast_attention": True},
    "unscaled": {**SMALL, "scale_qk": False, "rescale_output_factor": 2.0},
    "group_norm": {**SMALL, "norm_num_groups": 8, "residual_connection": True, "eps": 1e-6},
    "spatial_norm": {**SMALL, "spatial_norm_dim": 6, "_from_deprecated_attn_block": True},
    "context_layer_norm": {
        **SMALL,
        "cross_attention_dim": 48,
        "cross_attention_norm": "layer_norm",
    },
    "context_group_norm": {
        **SMALL,
        "cross_attention_dim": 48,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 6,
    },
    "added_group_norm": {
        **SMALL,
        "added_kv_proj_dim": 24,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 6,
    },
    "added": {**SMALL, "added_kv_proj_dim": 24, "added_proj_bias": False},
    "only_cross": {**SMALL, "added_kv_proj_dim": 24, "only_cross_attention": True},
    "joint": JOINT,
    "joint_last": {**JOINT, "context_pre_only": True, "out_context_dim": 40},
    "joint_out": {**JOINT, "out_dim": 48, "out_context_dim": 40},
    "pre_only": {**SMALL, "pre_only": True, "qk_norm": "rms_norm", "is_causal": True},
}
for _kind in modules.QKNorm.KINDS[1:]:
    ARGUMENTS[_kind] = {**SMALL, "kv_heads": 2, "qk_norm": _kind, "eps": 1e-6}
    ARGUMENTS[f"{_kind}_without_weights"] = {**ARGUMENTS[_kind], "elementwise_affine": False}
for _kind in modules.QKNorm.CONTEXT_KINDS[1:]:
    ARGUMENTS[f"joint_{_kind}"] = {**JOINT, "kv_heads": 4, "qk_norm": _kind}
    ARGUMENTS[f"joint_{_kind}_without_weights"] = {
        **ARGUMENTS[f"joint_{_kind}"],
        "elementwise_affine": False,
    }
FLUX_ARGUMENTS: dict[str, dict[str, Any]] = {
    "double": {**JOINT, "added_proj_bias": True, "bias": True, "out_dim": 32, "eps": 1e-6},
    "single": {**SMALL, "bias": True, "out_dim": 32, "pre_only": True, "eps": 1e-6},
}
MOCHI_ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "last": {"context_pre_only": True},
    "sized": {"heads": 2, "out_dim": 24, "dim_head": 6, "out_context_dim": 10, "bias": True},
}
SANA_ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms": {"norm_type": "rms_norm", "residual_connection": True, "kernel_sizes": (3, 5)},
    "layer": {"norm_type": "layer_norm", "mult": 0.5},
    "heads": {"num_attention_heads": 3, "attention_head_dim": 4, "kernel_sizes": ()},
}


class Recorder:
    """A processor that remembers what it was given and answers with its input."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        gain: float | Tensor = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        self.given = {"context": encoder_hidden_states, "temb": temb, "gain": gain, **kwargs}
        return hidden_states * gain


class ForwardOnly(nn.Module):
    """A processor that torch calls through `forward`."""

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shift: float = 0.0,
    ) -> Tensor:
        return attn.to_q(hidden_states) + shift


def make(**arguments: Any) -> Attention:
    return Attention(**{**SMALL, "processor": Recorder(), **arguments})


@pytest.fixture
def no_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "preset", lambda name: Recorder)


def assert_same_state(ours: nn.Module, other: nn.Module) -> None:
    """State keys in the same order, the same shapes, and loading both ways."""
    ours_now, other_now = ours.state_dict(), other.state_dict()
    assert list(ours_now) == list(other_now)
    assert {k: v.shape for k, v in ours_now.items()} == {k: v.shape for k, v in other_now.items()}
    ours.load_state_dict(copy.deepcopy(other_now), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, other_now[key])
    other.load_state_dict(ours_now, strict=True)


def assert_same_attributes(ours: nn.Module, other: nn.Module) -> None:
    hidden = set(vars(nn.Module())) | {"processor", "_from_deprecated_attn_block"}
    for name, value in vars(other).items():
        if name not in hidden:
            assert getattr(ours, name) == value, name
    for name, child in other.named_children():
        assert type(getattr(ours, name)).__name__ == type(child).__name__
        assert getattr(ours, name).training == child.training


# -- arguments, attributes, state ---------------------------------------------------------------


@needs_diffusers
@pytest.mark.parametrize("name", ["Attention", "MochiAttention", "SanaMultiscaleLinearAttention"])
def test_constructor_arguments(name: str) -> None:
    ours = inspect.signature(getattr(attention, name)).parameters
    expected = inspect.signature(getattr(theirs, name)).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in expected.values()
    ]


@needs_diffusers
@pytest.mark.parametrize("case", ARGUMENTS)
def test_attention_state_and_attributes(case: str) -> None:
    ours = make(**ARGUMENTS[case])
    other = theirs.Attention(**ARGUMENTS[case])
    assert_same_state(ours, other)
    assert_same_attributes(ours, other)
    assert ours.head_dim == 8


@needs_diffusers
@pytest.mark.parametrize("case", MOCHI_ARGUMENTS)
def test_mochi_state_and_attributes(case: str) -> None:
    arguments = {"query_dim": 32, "added_kv_proj_dim": 12, **MOCHI_ARGUMENTS[case]}
    ours = MochiAttention(processor=Recorder(), **arguments)
    other = theirs.MochiAttention(processor=theirs.MochiAttnProcessor2_0(), **arguments)
    assert_same_state(ours, other)
    assert_same_attributes(ours, other)


@needs_diffusers
@pytest.mark.usefixtures("no_presets")
@pytest.mark.parametrize("case", SANA_ARGUMENTS)
def test_sana_state_and_attributes(case: str) -> None:
    arguments = {"in_channels": 16, "out_channels": 24, **SANA_ARGUMENTS[case]}
    ours = SanaMultiscaleLinearAttention(**arguments)
    other = theirs.SanaMultiscaleLinearAttention(**arguments)
    assert_same_state(ours, other)
    assert_same_attributes(ours, other)
    x = torch.randn(2, 3 * other.to_q.out_features, 5, 4)
    for projection, expected in zip(ours.to_qkv_multiscale, other.to_qkv_multiscale, strict=True):
        assert torch.equal(projection(x), expected(x))


@needs_diffusers
@pytest.mark.parametrize("case", FLUX_ARGUMENTS)
def test_attention_stands_for_flux_attention(case: str) -> None:
    arguments = FLUX_ARGUMENTS[case]
    ours = make(qk_norm="rms_norm", **arguments)
    other = FluxAttention(**arguments)
    other_now = other.state_dict()
    assert set(ours.state_dict()) == set(other_now)
    ours.load_state_dict(other_now, strict=True)
    other.load_state_dict(ours.state_dict(), strict=True)
    for name in ("head_dim", "heads", "inner_dim", "out_dim", "added_kv_proj_dim", "use_bias"):
        assert getattr(ours, name) == getattr(other, name)

    ours.processor = other.processor
    x, text = torch.randn(2, 6, 32), torch.randn(2, 3, 24)
    streams = (x, text) if case == "double" else (x,)
    torch.testing.assert_close(ours(*streams), other(*streams))


@needs_diffusers
@pytest.mark.parametrize(
    "case", ["cross", "context_layer_norm", "context_group_norm", "group_norm"]
)
def test_diffusers_processor_runs_on_ours(case: str) -> None:
    ours, other = make(**ARGUMENTS[case]).eval(), theirs.Attention(**ARGUMENTS[case]).eval()
    other.load_state_dict(ours.state_dict())
    ours.processor = theirs.AttnProcessor()
    other.set_processor(theirs.AttnProcessor())
    x = torch.randn(2, 32, 4, 3) if case == "group_norm" else torch.randn(2, 6, 32)
    context = None if case == "group_norm" else torch.randn(2, 5, 48)
    mask = None if context is None else torch.randn(2, 1, 5)
    torch.testing.assert_close(ours(x, context, mask), other(x, context, mask))


@needs_diffusers
@pytest.mark.usefixtures("no_presets")
@pytest.mark.parametrize("size", [(2, 3), (6, 7)])
@pytest.mark.parametrize("case", ["plain", "rms", "heads"])  # their layer norm crashes
def test_diffusers_sana_processor_runs_on_ours(case: str, size: tuple[int, int]) -> None:
    arguments = {"in_channels": 16, "out_channels": 16, **SANA_ARGUMENTS[case]}
    ours = SanaMultiscaleLinearAttention(**arguments).eval()
    other = theirs.SanaMultiscaleLinearAttention(**arguments).eval()
    other.load_state_dict(ours.state_dict())
    ours.processor = other.processor
    x = torch.randn(2, 16, *size)
    torch.testing.assert_close(ours(x), other(x))


@needs_diffusers
@pytest.mark.parametrize("case", ["plain", "sized"])
def test_diffusers_mochi_processor_runs_on_ours(case: str) -> None:
    arguments = {"query_dim": 32, "added_kv_proj_dim": 12, **MOCHI_ARGUMENTS[case]}
    processor = theirs.MochiAttnProcessor2_0()
    ours = MochiAttention(processor=processor, **arguments)
    other = theirs.MochiAttention(processor=processor, **arguments)
    other.load_state_dict(ours.state_dict())
    inputs = (torch.randn(2, 5, 32), torch.randn(2, 3, 12), torch.ones(2, 3))
    torch.testing.assert_close(ours(*inputs), other(*inputs))


def test_qk_norm_across_heads_needs_no_kv_heads() -> None:
    for kind in ("layer_norm_across_heads", "rms_norm_across_heads"):
        attn = make(qk_norm=kind)
        assert attn.norm_q.weight.shape == attn.norm_k.weight.shape == (32,)


def test_pickles_and_copies() -> None:
    attn = make(qk_norm="rms_norm")
    for twin in (copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
        x = torch.randn(1, 2, 32)
        assert torch.equal(twin(x, gain=2.0), 2 * x)
        assert list(twin.state_dict()) == list(attn.state_dict())


# -- norm layers --------------------------------------------------------------------------------

NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "rms": ("RMSNorm", {"dim": 16, "eps": 1e-5}),
    "rms_without_weights": ("RMSNorm", {"dim": 16, "eps": 1e-5, "elementwise_affine": False}),
    "rms_bias": ("RMSNorm", {"dim": (16,), "eps": 1e-6, "bias": True}),
    "mochi": ("MochiRMSNorm", {"dim": 16, "eps": 1e-5}),
    "mochi_without_weights": (
        "MochiRMSNorm",
        {"dim": 16, "eps": 1e-5, "elementwise_affine": False},
    ),
    "fp32_layer": ("FP32LayerNorm", {"normalized_shape": 16}),
    "fp32_layer_without_weights": (
        "FP32LayerNorm",
        {"normalized_shape": 16, "elementwise_affine": False, "bias": False, "eps": 1e-6},
    ),
    "l2": ("LpNorm", {"p": 2, "dim": -1, "eps": 1e-5}),
}


@needs_diffusers
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", NORMS)
def test_norm_equals_diffusers(case: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    name, arguments = NORMS[case]
    ours = getattr(modules, name)(**arguments)
    other = getattr(their_norms, name)(**arguments)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    assert_same_state(ours, other)
    ours, other = ours.to(weights), other.to(weights)

    x = torch.randn(2, 3, 16, dtype=dtype)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    got, expected = ours(inputs[0]), other(inputs[1])
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    got.float().sin().sum().backward()
    expected.float().sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for mine, other_parameter in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other_parameter.grad)


@needs_diffusers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spatial_norm_equals_diffusers(dtype: torch.dtype) -> None:
    ours, other = modules.SpatialNorm(32, 6), theirs.SpatialNorm(32, 6)
    assert_same_state(ours, other)
    ours, other = ours.to(dtype), other.to(dtype)
    f, zq = torch.randn(2, 32, 6, 4, dtype=dtype), torch.randn(2, 6, 3, 2, dtype=dtype)
    assert torch.equal(ours(f, zq), other(f, zq))


@pytest.mark.parametrize("case", [c for c in NORMS if not c.startswith("l2")])
def test_norm_keeps_double_precision(case: str) -> None:
    name, arguments = NORMS[case]
    norm = getattr(modules, name)(**arguments).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    eps = arguments.get("eps", 1e-5)
    centred = x - x.mean(-1, keepdim=True) if name == "FP32LayerNorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


# -- processors and keywords --------------------------------------------------------------------


def test_keywords_reach_the_processor() -> None:
    attn = make()
    x, context = torch.randn(1, 2, 32), torch.randn(1, 3, 32)
    attn(x, context, temb=context, gain=2.0, ip_adapter_masks=None, ip_hidden_states=x)
    assert attn.processor.given == {"context": context, "temb": context, "gain": 2.0}


def test_unknown_keyword_is_named_with_the_possible_ones() -> None:
    with pytest.raises(TypeError, match="Recorder takes no scale; possible are gain, temb"):
        make()(torch.randn(1, 2, 32), scale=0.5)


def test_keywords_follow_the_processor() -> None:
    attn = make()
    x = torch.randn(1, 2, 32)
    attn.set_processor(ForwardOnly())
    assert "processor" in dict(attn.named_children())
    torch.testing.assert_close(attn(x, shift=1.0), attn.to_q(x) + 1)
    with pytest.raises(TypeError, match="ForwardOnly takes no gain; possible are shift"):
        attn(x, gain=2.0)

    attn.processor = Recorder()
    assert "processor" not in dict(attn.named_children())
    assert attn.get_processor(return_deprecated_lora=True) is attn.processor
    assert torch.equal(attn(x, gain=2.0), 2 * x)

    def plain(attn: nn.Module, hidden_states: Tensor, *, twist: int, **_: Any) -> Tensor:
        return hidden_states + twist

    attn.processor = plain
    assert torch.equal(attn(x, twist=3), x + 3)


def test_names_are_worked_out_once_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    monkeypatch.setattr(attention.inspect, "signature", None)
    attn = make()
    attn(torch.randn(1, 2, 32), gain=2.0)


def test_traces_as_one_graph() -> None:
    class Linear(ForwardOnly):
        pass

    layers = nn.ModuleList([make(processor=Linear()), make(processor=Linear())])

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, shift=0.5, ip_adapter_masks=None)
        return x

    x = torch.randn(1, 2, 32)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), run(x))


# -- fusing -------------------------------------------------------------------------------------


@needs_diffusers
@pytest.mark.parametrize("case", ["plain", "bias", "cross", "gqa", "joint", "added"])
def test_fused_state_equals_diffusers(case: str) -> None:
    ours, other = make(**ARGUMENTS[case]), theirs.Attention(**ARGUMENTS[case])
    other.load_state_dict(ours.state_dict())
    ours.fuse_projections()
    other.fuse_projections()
    expected = other.state_dict()
    assert ours.fused_projections
    assert set(ours.state_dict()) == set(expected)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("case", ["bias", "cross", "gqa", "joint"])
def test_fusing_is_undone(case: str) -> None:
    attn = make(**ARGUMENTS[case])
    before = copy.deepcopy(attn.state_dict())
    attn.fuse_projections()
    attn.fuse_projections()
    attn.fuse_projections(False)
    assert not attn.fused_projections
    after = attn.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_undoing_keeps_what_was_learned() -> None:
    attn = make(bias=True).requires_grad_(False)
    attn.fuse_projections()
    assert not attn.to_qkv.weight.requires_grad
    with torch.no_grad():
        attn.to_qkv.weight.add_(1)
    x = torch.randn(1, 2, 32)
    q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    attn.unfuse_projections()
    for expected, part in ((q, attn.to_q), (k, attn.to_k), (v, attn.to_v)):
        torch.testing.assert_close(part(x), expected)


def test_refuses_to_fuse_an_adapter() -> None:
    attn = make()
    attn.to_k = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="to_k: got Sequential"):
        attn.fuse_projections()
    assert not attn.fused_projections
    assert not hasattr(attn, "to_qkv")


# -- helpers ------------------------------------------------------------------------------------


@needs_diffusers
@pytest.mark.parametrize("upcast", [False, True])
def test_helpers_equal_diffusers(upcast: bool) -> None:
    arguments = {**SMALL, "upcast_attention": upcast, "upcast_softmax": not upcast}
    ours, other = make(**arguments), theirs.Attention(**arguments)
    x, grid = torch.randn(2, 5, 32), torch.randn(2, 3, 5, 32)
    for out_dim in (3, 4):
        for tensor in (x, grid):
            split = ours.head_to_batch_dim(tensor, out_dim)
            assert torch.equal(split, other.head_to_batch_dim(tensor, out_dim))
    heads = ours.head_to_batch_dim(x)
    assert torch.equal(ours.batch_to_head_dim(heads), x)

    q, k = heads.bfloat16(), ours.head_to_batch_dim(torch.randn(2, 4, 32)).bfloat16()
    for mask in (None, torch.randn(8, 5, 4).to(torch.float32 if upcast else torch.bfloat16)):
        got, expected = (
            ours.get_attention_scores(q, k, mask),
            other.get_attention_scores(q, k, mask),
        )
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected)

    mask = torch.randn(2, 1, 7)
    assert ours.prepare_attention_mask(None, 7, 2) is None
    for out_dim in (3, 4):
        for length in (7, 9):
            arguments_of = (mask, length, 2, out_dim)
            got = ours.prepare_attention_mask(*arguments_of)
            assert torch.equal(got, other.prepare_attention_mask(*arguments_of))


# -- errors -------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "query_dim": ({"query_dim": 0}, "query_dim: got 0"),
    "heads": ({"heads": 2.0}, "heads: got 2.0"),
    "dim_head": ({"dim_head": -8}, "dim_head: got -8"),
    "kv_heads": ({"kv_heads": 3}, "kv_heads: got 3, need a divisor of the number of heads"),
    "out_dim": ({"out_dim": 30}, "dim_head: got 8, need a divisor of out_dim, which is 30"),
    "qk_norm": ({"qk_norm": "rms"}, "qk_norm: got 'rms', possible are None, 'layer_norm'"),
    "added_qk_norm": ({"qk_norm": "l2", "added_kv_proj_dim": 8}, "qk_norm with added_kv_proj_dim"),
    "context_norm": ({"cross_attention_norm": "rms"}, "cross_attention_norm: got 'rms'"),
    "groups": ({"norm_num_groups": 5}, "norm_num_groups: got 5, need a divisor of query_dim"),
    "spatial": ({"query_dim": 40, "spatial_norm_dim": 6}, "f_channels: got 40"),
    "only_cross": ({"only_cross_attention": True}, "only_cross_attention without added_kv"),
    "pre_only": ({"context_pre_only": "no"}, "context_pre_only: got 'no'"),
    "dropout": ({"dropout": 1.5}, "dropout: got 1.5"),
    "rescale": ({"rescale_output_factor": 0.0}, "rescale_output_factor: got 0"),
    "processor": ({"processor": "AttnProcessor"}, "processor: got 'AttnProcessor'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make(**arguments)


def test_bad_arguments_of_the_others() -> None:
    with pytest.raises(ValueError, match="norm_type: got 'group'"):
        SanaMultiscaleLinearAttention(16, 16, norm_type="group")
    with pytest.raises(ValueError, match="kernel_size: got 4"):
        SanaMultiscaleLinearAttention(16, 16, kernel_sizes=(4,))
    with pytest.raises(ValueError, match="num_attention_heads: got 0"):
        SanaMultiscaleLinearAttention(4, 16)
    with pytest.raises(ValueError, match="out_dim, which is 33"):
        MochiAttention(32, 8, Recorder(), dim_head=8, out_dim=33)
    with pytest.raises(ValueError, match="cross_attention_norm: got None"):
        make().norm_encoder_hidden_states(torch.randn(1, 2, 32))
    for size in (0, 5, 1.5):
        with pytest.raises(ValueError, match=f"slice_size: got {size}"):
            make().set_attention_slice(size)


def test_default_processors() -> None:
    expected = {
        Attention(16, heads=2, dim_head=8): "AttnProcessor2_0",
        Attention(16, heads=2, dim_head=8, scale_qk=False): "AttnProcessor2_0",
        MochiAttention(16, 8, None, heads=2, dim_head=8): "MochiAttnProcessor2_0",
        SanaMultiscaleLinearAttention(16, 16): "SanaMultiscaleAttnProcessor2_0",
    }
    for attn, name in expected.items():
        assert type(attn.processor).__name__ == name


def test_layers_share_one_compilation() -> None:
    layers = [make(processor=None, qk_norm="rms_norm", kv_heads=2) for _ in range(3)]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def call(layer: Attention, x: Tensor) -> Tensor:
        return layer(x, temb=None, ip_adapter_masks=None)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    x = torch.randn(1, 4, 32)
    for layer in layers:
        torch.testing.assert_close(compiled(layer, x), layer(x))
    assert len(graphs) == 1
