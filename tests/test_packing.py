"""Packed projections: one product, and a module that is otherwise what it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnproc
from attnproc import presets
from attnproc.attention import Attention
from attnproc.packing import Packing, pack, unpack
from attnproc.types import Call, Site

WIDTH = 16


def _attention(cross: int | None = None, **changes) -> Attention:
    torch.manual_seed(0)
    return Attention(WIDTH, cross, heads=2, dim_head=8, **changes)


def _joint(**changes) -> Attention:
    sizes = {"added_kv_proj_dim": 12, "context_pre_only": False, "bias": True}
    return _attention(**sizes, processor=presets.JointAttnProcessor2_0(), **changes)


KINDS: dict[str, Callable[[], tuple[Attention, tuple[Tensor, ...]]]] = {
    "self": lambda: (_attention(), (torch.randn(2, 5, WIDTH),)),
    "self with bias": lambda: (_attention(bias=True), (torch.randn(2, 5, WIDTH),)),
    "cross": lambda: (_attention(12), (torch.randn(2, 5, WIDTH), torch.randn(2, 3, 12))),
    "cross of one width": lambda: (
        _attention(WIDTH),
        (torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)),
    ),
    "grouped": lambda: (_attention(kv_heads=1), (torch.randn(2, 5, WIDTH),)),
    "joint": lambda: (_joint(), (torch.randn(2, 5, WIDTH), torch.randn(2, 3, 12))),
    "added": lambda: (
        _attention(
            added_kv_proj_dim=12, norm_num_groups=4, processor=presets.AttnAddedKVProcessor2_0()
        ),
        (torch.randn(2, WIDTH, 3, 3), torch.randn(2, 3, 12)),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else torch.cat([t.flatten() for t in out])


def _storages(module: nn.Module) -> int:
    """Bytes of the storages that hold a module's parameters, each counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in module.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def _is_packed(attn: nn.Module) -> bool:
    """Whether each group of the module lies in one storage."""
    weights = [[layer.weight for layer in layers] for layers in attn.packing.groups]
    return all(len({w.untyped_storage().data_ptr() for w in parts}) == 1 for parts in weights)


@each_kind
def test_packed_is_unpacked(kind: str) -> None:
    attn, inputs = KINDS[kind]()
    state = {key: value.clone() for key, value in attn.state_dict().items()}
    names = [name for name, _ in attn.named_parameters()]
    before = _first(attn(*inputs))

    assert pack(attn)[""]

    assert _is_packed(attn)
    assert [name for name, _ in attn.named_parameters()] == names
    assert attn.state_dict().keys() == state.keys()
    torch.testing.assert_close(_first(attn(*inputs)), before)
    with torch.no_grad():
        torch.testing.assert_close(_first(attn(*inputs)), before)

    assert unpack(attn) == 1
    assert all(torch.equal(value, state[key]) for key, value in attn.state_dict().items())
    assert torch.equal(_first(attn(*inputs)), before)
    assert attn.to_k.weight.untyped_storage().nbytes() == attn.to_k.weight.nbytes


@each_kind
def test_gradients_and_optimiser_steps_are_the_same(kind: str) -> None:
    attn, inputs = KINDS[kind]()
    attn, inputs = attn.double(), tuple(x.double().requires_grad_() for x in inputs)
    plain, theirs = copy.deepcopy(attn), tuple(x.detach().requires_grad_() for x in inputs)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (attn, plain)]
    pack(attn)

    for _ in range(3):
        for module, optimiser, given in zip(
            (attn, plain), optimisers, (inputs, theirs), strict=True
        ):
            optimiser.zero_grad()
            _first(module(*given)).square().sum().backward()
            optimiser.step()

    assert _is_packed(attn)
    for ours, other in zip(
        (*attn.parameters(), *inputs), (*plain.parameters(), *theirs), strict=True
    ):
        torch.testing.assert_close(ours, other)
        torch.testing.assert_close(ours.grad, other.grad)


def test_one_product_a_stream() -> None:
    attn, inputs = KINDS["joint"]()
    pack(attn)
    with torch.no_grad(), torch.profiler.profile() as profile:
        attn(*inputs)
    linears = [event for event in profile.key_averages() if event.key == "aten::linear"]
    assert linears[0].count == 4  # two streams, two outputs


def test_memory_is_not_doubled() -> None:
    packed, fused = _attention(bias=True), _attention(bias=True)
    before = _storages(packed)
    pack(packed)
    fused.fuse_projections()
    projections = 3 * (WIDTH * WIDTH + WIDTH) * 4
    assert _storages(packed) == before
    assert _storages(fused) == before + projections


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(_saved(m), weights_only=False),
    "to": lambda m: copy.deepcopy(m).to(torch.float64).to(torch.float32),
    "meta": lambda m: _filled(copy.deepcopy(m).to("meta").to_empty(device="cpu"), m),
    "assign": lambda m: _assigned(copy.deepcopy(m), m),
    "ema": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def _filled(module: nn.Module, like: nn.Module) -> nn.Module:
    module.load_state_dict(like.state_dict())
    return module


def _assigned(module: nn.Module, like: nn.Module) -> nn.Module:
    state = {key: value.clone() for key, value in like.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


@pytest.mark.parametrize("move", MOVES)
def test_a_copy_is_packed_and_its_own(move: str) -> None:
    attn, inputs = KINDS["self with bias"]()
    pack(attn)
    expected = attn(*inputs)

    moved = MOVES[move](attn)

    assert _is_packed(moved)
    assert moved.to_q.weight.data_ptr() != attn.to_q.weight.data_ptr()
    assert moved.packing.groups[0][0] is moved.to_q
    assert _storages(moved) == _storages(attn)
    assert torch.equal(moved(*inputs), expected)


def test_half_precision_stays_packed() -> None:
    attn, (x,) = KINDS["self"]()
    reference = copy.deepcopy(attn).bfloat16()(x.bfloat16())
    pack(attn)
    attn.bfloat16()
    assert _is_packed(attn)
    torch.testing.assert_close(attn(x.bfloat16()), reference)


def test_optimiser_state_goes_on_after_packing() -> None:
    attn, (x,) = KINDS["self"]()
    plain = copy.deepcopy(attn.double())
    x = x.double()
    for module, packs in ((attn, True), (plain, False)):
        optimiser = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        for step in range(4):
            if packs and step == 2:
                pack(module)
            optimiser.zero_grad()
            module(x).square().sum().backward()
            optimiser.step()
    for ours, other in zip(attn.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("kind", ["self with bias", "cross", "joint"])
def test_compiles_to_one_graph_that_follows_its_weights(kind: str) -> None:
    attn, inputs = KINDS[kind]()
    pack(attn)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(_first(compiled(*inputs)), _first(attn(*inputs)))
    _first(compiled(*inputs)).sum().backward()
    grads = [p.grad.clone() for p in attn.parameters()]
    attn.zero_grad()
    _first(attn(*inputs)).sum().backward()
    for ours, compiled_grad in zip(attn.parameters(), grads, strict=True):
        torch.testing.assert_close(ours.grad, compiled_grad)

    # The graph asks for the common storage at run time, so losing it changes nothing.
    with torch.no_grad():
        attn.to_v.weight.data = torch.randn_like(attn.to_v.weight)
        assert not _is_packed(attn)
        torch.testing.assert_close(_first(compiled(*inputs)), _first(attn(*inputs)))


def test_compiled_autocast() -> None:
    attn, (x,) = KINDS["self with bias"]()
    pack(attn)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = compiled(x), attn(x)
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "unet_kandinsky", "lumina"])
def test_whole_models(name: str) -> None:
    pytest.importorskip("diffusers")
    from tiny_models import built, outputs

    model, inputs = built(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attnproc.swap(model)
    before = outputs(model, inputs)
    packed = pack(model)
    assert packed
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-4)
    unpack(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(outputs(model, inputs), before)


def test_autocast_and_frozen_weights() -> None:
    attn, (x,) = KINDS["self with bias"]()
    plain = copy.deepcopy(attn)
    pack(attn)
    attn.to_out.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = attn(x), plain(x)
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    ours.sum().backward()
    assert attn.to_q.weight.grad.dtype is torch.float32

    frozen = copy.deepcopy(plain).requires_grad_(False)
    pack(frozen)
    x.requires_grad_()
    frozen(x).sum().backward()
    ours = x.grad
    x.grad = None
    plain(x).sum().backward()
    torch.testing.assert_close(x.grad, ours)


def test_adapters_on_the_split_names_still_apply() -> None:
    attn, (x,) = KINDS["self"]()
    attn.set_processor(presets.LoRAAttnProcessor2_0(WIDTH))
    for update in attn.processor.children():
        nn.init.normal_(update.up.weight)
    before = attn(x)
    pack(attn)
    torch.testing.assert_close(attn(x), before)


def test_all_adapters_of_a_model_still_apply() -> None:
    pytest.importorskip("diffusers")
    from tiny_models import built, outputs

    model, inputs = built("unet")
    attnproc.on(model).with_lora("style", rank=2).with_custom_diffusion()
    attnproc.on(model, "*attn1").with_pag()
    cross = attnproc.on(model, "*attn2").with_ip_adapter(16)
    for _, attn in cross.layers():
        nn.init.normal_(attn.processor.to_q_style_lora.up.weight)
    tokens = torch.randn(2, 4, 16)
    inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], [tokens])
    before = outputs(model, inputs)
    pack(model)
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-4)


def test_a_packed_model_of_diffusers_is_saved(tmp_path) -> None:
    pytest.importorskip("diffusers")
    from tiny_models import built

    model, _ = built("unet")
    pack(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_a_replaced_layer_is_called() -> None:
    attn, (x,) = KINDS["self"]()
    pack(attn)
    attn.to_k = nn.Sequential(attn.to_k, nn.Tanh())
    site = Site(attn.processor.recipe, attn.processor, attn, Call(x))
    assert torch.equal(site.products(("to_q", "to_k", "to_v"), x)[1], attn.to_k(x))

    hooked, _ = KINDS["self"]()
    pack(hooked)
    calls = []
    hooked.to_v.register_forward_hook(lambda *args: calls.append(args))
    hooked(x)
    assert len(calls) == 1

    patched, _ = KINDS["self"]()
    pack(patched)
    patched.to_v.forward = lambda x: torch.zeros_like(x)
    assert torch.equal(patched(x), patched.to_out[0].bias.expand_as(x))


def test_refusals_are_listed_and_nothing_is_changed() -> None:
    class Quantised(nn.Linear):
        pass

    model = nn.ModuleDict({f"a{i}": _attention(bias=True) for i in range(6)})
    model["a0"].to_q = Quantised(WIDTH, WIDTH)
    model["a1"].to_k.bias = None
    model["a2"].to_v.half()
    model["a3"].to_k.requires_grad_(False)
    model["a4"].fuse_projections()
    tied = _attention()
    tied.to_v = tied.to_k
    model["a6"] = tied
    with pytest.raises(ValueError, match="can't be packed") as error:
        pack(model)
    message = str(error.value)
    for part in (
        "a0.to_q: is a Quantised",
        "a1.to_k: differs",
        "a2.to_v: has dtype torch.float16",
        "a3.to_k: has requires_grad False",
        "a4.to_qkv: is a fused copy",
        "a6.to_v: is one of its siblings too",
    ):
        assert part in message
    assert "a5" not in message
    assert not any(isinstance(m, Packing) for m in model.modules())


def test_peft_layers_are_refused_and_survive_on_top() -> None:
    peft = pytest.importorskip("peft")
    attn, (x,) = KINDS["self"]()
    pack(attn)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, attn)
    wrapped = attn(x)
    unpack(attn)
    torch.testing.assert_close(attn(x), wrapped)
    with pytest.raises(ValueError, match=r"to_q: is a Linear|to_q: is a LoraLayer|to_q: is a "):
        pack(attn)


def test_saved_as_safetensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    attn, _ = KINDS["self with bias"]()
    state = {key: value.clone() for key, value in attn.state_dict().items()}
    pack(attn)
    safetensors.save_file(attn.state_dict(), tmp_path / "a.safetensors")
    loaded = safetensors.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
