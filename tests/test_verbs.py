"""The verbs: sharing, scales and schedules, snapshots, models, errors, one compilation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import attnproc
from attnproc import Attention, Clock, Processor, Schedule, on


def _attn(**changes: object) -> Attention:
    torch.manual_seed(0)
    sizes = {"query_dim": 32, "heads": 4, "dim_head": 8}
    return Attention(**{**sizes, **changes}).requires_grad_(False)


def _styled(attn: Attention, **options: object) -> Processor:
    processor = attnproc.AttnProcessor2_0().with_lora(attn, "style", rank=2, **options)
    torch.manual_seed(1)
    for parameter in processor.parameters():
        nn.init.normal_(parameter)
    return processor


X = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))


def test_copies_share_weights_and_leave_the_original_alone() -> None:
    attn = _attn()
    plain = attnproc.AttnProcessor2_0()
    styled = plain.with_lora(attn, "style")
    sliced = styled.with_slicing(2)
    assert not isinstance(plain, torch.nn.Module)
    assert sliced.to_q_style_lora is styled.to_q_style_lora
    assert plain.recipe is attnproc.AttnProcessor2_0.recipe
    assert plain.names() == ()
    assert sliced.names() == ("style", "slicing")


def test_low_rank_updates_add_up_by_name_and_weight() -> None:
    attn = _attn()
    first, plain = _styled(attn), attnproc.AttnProcessor2_0()
    both = first.with_lora(attn, "other", rank=3, alpha=6, weight=0.5)
    nn.init.normal_(both.to_q_other_lora.up.weight)
    merged = copy.deepcopy(attn)
    for name, scale in (("style", 1.0), ("other", 0.5 * 2)):
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            update = getattr(both, f"{projection}_{name}_lora")
            layer = getattr(merged, projection)
            layer = layer[0] if isinstance(layer, nn.ModuleList) else layer
            layer.weight.data += scale * update.up.weight @ update.down.weight
    torch.testing.assert_close(both(attn, X), plain(merged, X), atol=1e-4, rtol=1e-4)
    assert torch.equal(both.without("other")(attn, X), first(attn, X))


def test_a_weight_an_image_equals_the_images_alone() -> None:
    attn = _attn()
    each = _styled(attn, weight=torch.tensor([0.3, 0.9]))(attn, X)
    for i, weight in enumerate((0.3, 0.9)):
        alone = _styled(attn, weight=weight)(attn, X[i : i + 1])
        torch.testing.assert_close(each[i : i + 1], alone)


@pytest.mark.parametrize(("time", "weight"), [(0.0, 0.0), (0.3, 0.8), (0.6, 0.0), (1.0, 0.0)])
def test_a_schedule_holds_between_begin_and_end(time: float, weight: float) -> None:
    attn, clock = _attn(), Clock()
    scheduled = _styled(attn, weight=Schedule(clock, 0.8, begin=0.2, end=0.6))
    clock.set(time)
    assert torch.equal(scheduled(attn, X), _styled(attn, weight=weight)(attn, X))


def test_a_schedule_may_be_any_function_of_the_step() -> None:
    attn, clock = _attn(), Clock()
    falling = Schedule(clock, 0.8, shape=lambda time: 1 - time)
    clock.set(0.25)
    expected = _styled(attn, weight=0.8 * 0.75)(attn, X)
    assert torch.equal(_styled(attn, weight=falling)(attn, X), expected)


def test_scale_zero_does_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    attn = _attn(cross_attention_dim=20)
    processor = attnproc.AttnProcessor2_0().with_ip_adapter(attn, 20, (4, 2), [0.0, 0.5])
    called = []
    processor.to_k_ip[0].register_forward_hook(lambda *_: called.append(0))
    processor.to_k_ip[1].register_forward_hook(lambda *_: called.append(1))
    states = [torch.randn(2, 1, 4, 20), torch.randn(2, 1, 2, 20)]
    processor(attn, X, torch.randn(2, 7, 20), ip_hidden_states=states)
    assert called == [1]


def test_prompts_with_equally_many_tokens_take_one_kernel_call() -> None:
    attn = _attn(cross_attention_dim=20)
    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor, scoring: object) -> Tensor:
        calls.append(k.shape)
        return attnproc.kernels.REFERENCE(q, k, v, scoring)

    kernel = attnproc.Kernel("counted", counted)
    text = torch.randn(2, 7, 20)
    states = [torch.randn(2, 3, 4, 20), torch.randn(2, 1, 4, 20), torch.randn(2, 1, 6, 20)]
    masks = [torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8)]
    processor = attnproc.IPAdapterAttnProcessor(32, 20, (4, 4, 6), [[0.1, 0.2, 0.3], 0.4, 0.5])
    expected = processor(attn, X, (text, states), ip_adapter_masks=masks)
    found = processor.but(kernel=kernel)(attn, X, (text, states), ip_adapter_masks=masks)
    torch.testing.assert_close(found, expected)
    assert sorted(shape[0] for shape in calls) == [2, 2, 4 * 2]


def test_a_mask_keeps_a_prompt_to_its_region_in_joint_sequences() -> None:
    attn = _attn(added_kv_proj_dim=32, context_pre_only=False, qk_norm="rms_norm")
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    text, states = torch.randn(2, 7, 32), [torch.randn(2, 1, 4, 20)]
    plain = attnproc.JointAttnProcessor2_0()
    prompted = plain.with_ip_adapter(attn, 20, 4)
    base, _ = plain(attn, X, text)
    found, _ = prompted(attn, X, text, ip_hidden_states=states, ip_adapter_masks=[mask])
    changed = (found - base).abs().amax(dim=-1).view(2, 4, 4) > 1e-3
    assert changed[..., 0].all()
    assert not changed[..., -1].any()


def test_errors_name_the_argument() -> None:
    attn, plain = _attn(), attnproc.AttnProcessor2_0()
    with pytest.raises(ValueError, match=r"'style'.*already"):
        _styled(attn).with_lora(attn, "style")
    with pytest.raises(ValueError, match="projections"):
        plain.with_lora(attn, "style", projections=("to_x",))
    with pytest.raises(ValueError, match="chunks is 4"):
        plain.with_pag(4)
    with pytest.raises(ValueError, match="no such part"):
        plain.without("style")
    with pytest.raises(ValueError, match="backend 'flsh'"):
        plain.with_backend("flsh")
    joint = _attn(added_kv_proj_dim=32, context_pre_only=False)
    prompted = attnproc.JointAttnProcessor2_0().with_joint_ip_adapter(joint, 20)
    with pytest.raises(ValueError, match="shares weight names"):
        prompted.with_ip_adapter(joint, 20)
    one = plain.with_ip_adapter(attn, 20)
    with pytest.raises(ValueError, match="2 image prompts, this processor holds 1"):
        one(attn, X, ip_hidden_states=[X[..., :20], X[..., :20]])
    with pytest.raises(ValueError, match="tuple"):
        plain(attn, X, (X, [X]))


def test_a_combination_pickles_copies_and_trains() -> None:
    attn = _attn()
    processor = _styled(attn).with_pag(2).with_custom_diffusion(attn).with_slicing(3)
    expected = processor(attn, X)
    for other in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert other.recipe == processor.recipe
        assert torch.equal(other(attn, X), expected)
    expected.sum().backward()
    assert all(p.grad is not None for p in processor.parameters())


def test_one_compilation_whatever_the_weight_and_the_step() -> None:
    clock = Clock()

    @torch.compile(fullgraph=True, backend="eager")
    def run(attn: Attention, x: Tensor, text: Tensor, states: list[Tensor]) -> Tensor:
        return attn(x, text, ip_hidden_states=states)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer in range(3):
            attn = _attn(cross_attention_dim=20)
            weight = Schedule(clock, 0.8, begin=0.2, end=0.6)
            processor = _styled(attn, weight=weight).with_ip_adapter(
                attn, 20, 4, torch.tensor(0.1 * layer)
            )
            attn.set_processor(processor.with_slicing(3).with_custom_diffusion(attn))
            text, states = torch.randn(2, 7, 20), [torch.randn(2, 1, 4, 20)]
            for time in (0.0, 0.3, 0.9):
                clock.set(time)
                processor.scale = [torch.tensor(time)]
                found = run(attn, X, text, states)
                torch.testing.assert_close(found, attn(X, text, ip_hidden_states=states))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_attn() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for attn in self.blocks:
            x = x + attn(x)
        return x


def test_the_verbs_on_chosen_layers_of_a_model_and_back() -> None:
    model = _Model()
    base, before = model(X), on(model).snapshot()
    chosen = on(model, "blocks.[12]").with_lora("style", rank=2).with_slicing(2)
    assert [path for path, _ in chosen.layers()] == ["blocks.1", "blocks.2"]
    assert model.blocks[0].processor.names() == ()
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    chosen.scale("style", 0.5).without("slicing")
    assert model.blocks[1].processor.lora_weights == {"style": 0.5}
    assert "LoRA(style)" in on(model).describe()
    for parameter in model.parameters():
        parameter.data.sub_(0.01)
    before.restore()
    torch.testing.assert_close(model(X), base, atol=1e-5, rtol=0)
    assert all(attn.processor.names() == () for attn in model.blocks)


def test_a_snapshot_holds_weights_scales_and_dtype() -> None:
    model = _Model()
    view = on(model).with_lora("style").with_ip_adapter(20)
    saved, weights = view.snapshot(), copy.deepcopy(model.state_dict())
    for _, attn in view.layers():
        attn.processor.scale[0] = 9.0
        attn.processor.to_q_style_lora.up.weight.data.fill_(3)
        attn.processor.half()
    saved.restore()
    assert all(attn.processor.scale == [1.0] for _, attn in view.layers())
    for name, value in model.state_dict().items():
        assert value.dtype == weights[name].dtype
        assert torch.equal(value, weights[name])


def test_a_verb_that_fails_for_one_layer_changes_none() -> None:
    model = _Model()
    on(model, "blocks.2").with_lora("style")
    with pytest.raises(ValueError, match="already"):
        on(model).with_lora("style")
    assert model.blocks[0].processor.names() == ()


def test_layers_by_kind_depth_and_resolution() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    assert all("attn2" in path for path, _ in on(unet, kind="cross").layers())
    assert {path[:10] for path, _ in on(unet, depth=2).layers()} == {"mid_block."}
    eight = {path.rsplit(".attentions")[0] for path, _ in on(unet, resolution=8).layers()}
    assert eight == {"down_blocks.1", "up_blocks.1"}
    with pytest.raises(ValueError, match="layers: none fits"):
        on(unet, kind="joint")


def test_the_clock_follows_a_pipeline() -> None:
    class Pipeline:
        class scheduler:
            timesteps = range(4)

    clock, times = on(_Model()).clock, []
    for step in range(4):
        times.append(clock.fraction)
        assert clock.on_step_end(Pipeline, step, None, {"latents": 1}) == {"latents": 1}
    assert times == [0.0, 0.25, 0.5, 0.75]
    assert clock.fraction == 0.0


def test_a_mask_of_the_unperturbed_rows_reaches_a_blurred_third() -> None:
    attn, x = _attn(), torch.cat((X, X, X))
    plain = torch.arange(16)[None] < torch.tensor([[9], [16], [9], [16]])
    processor = attnproc.AttnProcessor2_0().with_pag(3, blur=1.0)
    short = processor(attn, x, attention_mask=plain)
    torch.testing.assert_close(short, processor(attn, x, attention_mask=plain.repeat(2, 1)[:6]))
