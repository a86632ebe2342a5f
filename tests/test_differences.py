"""Where diffusers is wrong or fails: ours is right by the oracle, and diffusers shown not to be.

Each row of docs/differences.md is a test here, run for every class that it is about.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, each, select
from naive import naive
from peak import peak_bytes

import attnproc
from attnproc.kernels.reference import REFERENCE
from attnproc.kernels.reference import reference as whole
from attnproc.verify.build import build, diffusers_found, evaluate
from attnproc.verify.check import compare
from attnproc.verify.references import LORA_BASES, reference_class

pytestmark = pytest.mark.usefixtures("stand_ins")

THEIRS = diffusers_found()
WRONG = [case for case in CASES if case.compare == "naive"]
QK = {"qk_layer", "qk_plain", "qk_fp32", "qk_rms", "qk_l2", "qk_heads", "qk_rms_heads"}
MASKS = {"keys", "bias", "bias_q", "bias_heads", "pag2_bias", "pag3_bias"}
covered: set[str] = set()


def row(name: str, *, tags: set[str] | None = None, without: str = "") -> pytest.MarkDecorator:
    """The wrong cases of classes whose name holds `name` and that have any of the tags."""
    found = [
        case
        for case in WRONG
        if any(part in case.cls for part in name.split("|"))
        and (not tags or case.tags & tags)
        and not (without and any(part in case.id for part in without.split("|")))
    ]
    assert found, name
    covered.update(case.id for case in found)
    return each(found)


def ours_is_right(case: Case) -> None:
    assert compare(case, None if THEIRS else {}).failures == []


def theirs_differs(case: Case) -> None:
    """diffusers' class runs, by its module, and gives something else."""
    if not THEIRS:
        return
    theirs = build(case, "theirs", torch.float64)
    outputs = theirs.call(direct=False)
    right = naive(case.cls, theirs.attn, theirs.processor, theirs.inputs)
    gaps = [(a - b).abs().max() / b.abs().max() for a, b in zip(outputs, right, strict=True)]
    assert max(gaps) > 1e-5


def theirs_fails(case: Case, *errors: type[Exception]) -> None:
    """diffusers' class raises, in the call or in the backward pass."""
    if not THEIRS:
        return
    theirs = build(case, "theirs", torch.float32)
    with pytest.raises(errors or (RuntimeError, ValueError)):
        evaluate(theirs, theirs.call(direct=False), case.grads)


@row("", tags={"no_scale"}, without="PAGCFGJoint|PAGJoint")
def test_module_scale_is_honoured(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


@row("", tags=QK, without="grid|bias|XFormersJoint|Hunyuan")
def test_qk_norm_is_honoured(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


@row("", tags=QK, without="fused-gqa")
def test_qk_norm_is_honoured_with_other_options(case: Case) -> None:
    ours_is_right(case)


@row("", tags={"causal"})
def test_causal_module_is_honoured(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


@row("", tags={"gqa", "mqa"})
def test_fewer_key_heads(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("JointAttn|AuraFlow", tags=MASKS, without="XFormers")
def test_mask_of_a_joint_sequence_is_honoured(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


@row("XFormersJoint", tags=MASKS)
def test_mask_of_a_joint_sequence_with_xformers(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("CustomDiffusion", tags=MASKS)
def test_mask_with_custom_diffusion(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("CrossFrame", tags=MASKS)
def test_mask_over_the_text_with_cross_frame(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("FusedCogVideoX", tags=MASKS)
def test_mask_with_fused_cogvideox(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("AddedKV", tags={"same_length", "only_cross"})
def test_mask_with_added_keys_of_any_length(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("XFormersAttnAddedKV", tags=MASKS, without="same_length|only_cross")
def test_mask_with_added_keys_and_xformers(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("NPU", tags=MASKS, without="bias_q|qk_rms|keys")
def test_added_mask_is_not_inverted_on_npu(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


@row("NPU", tags=MASKS)
def test_masks_of_every_form_on_npu(case: Case) -> None:
    ours_is_right(case)


@row("SanaLinear", tags=MASKS)
def test_mask_of_linear_attention_is_honoured(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


@row("MochiVae", tags={"bias"})
def test_mask_of_a_causal_module(case: Case) -> None:
    """diffusers leaves it to the kernel that torch picks: some take both, some refuse."""
    ours_is_right(case)


@row("MochiAttn", tags={"scattered"})
def test_rows_stay_in_place_when_the_text_has_gaps(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


@row("FusedJoint|PAGJoint|PAGCFGJoint|PAGCFGHunyuan", tags={"grid", "pag2_grid", "pag3_grid"})
def test_grids(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("Sliced", tags={"spatial"})
def test_spatial_norm_in_slices(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


@row("Lumina|Mochi|FusedJoint|AuraFlow", tags={"no_mask", "alone", "pre_only", "one_query"})
def test_defaults_and_shapes_that_fail(case: Case) -> None:
    ours_is_right(case)
    if "grid" not in case.tags:
        theirs_fails(case, AttributeError, TypeError, RuntimeError)


@row("FusedCogVideoX", tags={"no_qk"})
def test_backward_of_fused_cogvideox(case: Case) -> None:
    ours_is_right(case)
    theirs_fails(case)


@row("IPAdapterXFormers", tags={"masked", "mask_tensor", "two_masked", "some_masked", "odd_mask"})
def test_picture_masks_keep_their_precision(case: Case) -> None:
    ours_is_right(case)
    theirs_differs(case)


def test_every_wrong_case_has_a_row() -> None:
    assert {case.id for case in WRONG} == covered


@pytest.mark.parametrize("cls", ["IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0"])
def test_image_prompt_without_cross_attention_dim(cls: str) -> None:
    """Constructing takes the hidden size, as the class for xFormers does."""
    made = getattr(attnproc, cls)(32)
    assert made.to_k_ip[0].in_features == 32
    if THEIRS:
        with pytest.raises(TypeError):
            reference_class(cls)(32)


@pytest.mark.parametrize("cls", LORA_BASES)
def test_lora_classes_compute(cls: str) -> None:
    """They are empty shells in diffusers; their parity is in test_parity."""
    made = getattr(attnproc, cls)(32, 24)
    assert {"to_q_lora.up.weight", "to_out_lora.down.weight"} <= made.state_dict().keys()
    assert torch.count_nonzero(made.to_q_lora.up.weight) == 0
    if THEIRS:
        assert not callable(reference_class(cls)())


PACKAGES = {
    "xformers": ("XFormersAttnProcessor-self", "XFormersJointAttnProcessor-text"),
    "torch_npu": ("AttnProcessorNPU-self",),
}


@pytest.mark.parametrize(("package", "name"), [(p, n) for p, ns in PACKAGES.items() for n in ns])
def test_a_missing_package_is_named(
    package: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constructing never fails; the call says what to install."""
    case = next(case for case in select(name) if case.id == name)
    dtype = torch.bfloat16 if package == "torch_npu" else torch.float32
    setting = build(case, "ours", dtype, own_modules=not THEIRS)
    _hide(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"pip install {package}"):
        setting.call()


def _hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)


def test_image_prompt_without_text_on_flux() -> None:
    torch.manual_seed(0)
    attn = attnproc.Attention(32, heads=4, dim_head=8, pre_only=True, qk_norm="rms_norm").double()
    processor = attnproc.FluxIPAdapterJointAttnProcessor2_0(32, 20, scale=0.7).double()
    x, state = torch.randn(2, 12, 32).double(), torch.randn(2, 4, 20).double()
    plain = attnproc.FluxSingleAttnProcessor2_0()(attn, x)

    found = processor(attn, x, ip_hidden_states=[state])

    q = attn.norm_q(attn.to_q(x).unflatten(-1, (4, 8))).transpose(1, 2)
    layers = processor.to_k_ip[0], processor.to_v_ip[0]
    k, v = (layer(state).unflatten(-1, (4, 8)).transpose(1, 2) for layer in layers)
    prompt = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(dim=-1) @ v
    torch.testing.assert_close(found, plain + 0.7 * prompt.transpose(1, 2).flatten(2))
    if diffusers_found():
        from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

        theirs = FluxIPAdapterAttnProcessor(32, 20, scale=0.7).double()
        attn.head_dim, attn.added_kv_proj_dim = 8, None
        torch.testing.assert_close(theirs(attn, x, ip_hidden_states=[state]), plain)


OLDER = (
    ("AttnProcessor", {}),
    ("SlicedAttnProcessor", {"slice_size": 1}),
    ("CrossFrameAttnProcessor", {"batch_size": 2}),
)


@pytest.mark.parametrize(("name", "init"), OLDER, ids=lambda value: str(value))
def test_older_classes_keep_no_scores(name: str, init: dict[str, int]) -> None:
    attn = attnproc.Attention(query_dim=64, heads=8, dim_head=8)
    x = torch.randn(2, 512, 64)
    held = peak_bytes(lambda: getattr(attnproc, name)(**init)(attn, x))
    assert held < 2 * 8 * 512 * 512 * 4 / 4  # a quarter of the scores


def test_slices_bound_a_kernel_that_keeps_scores() -> None:
    attn = attnproc.Attention(query_dim=64, heads=8, dim_head=8)
    x = torch.randn(1, 512, 64)
    calls = []
    plain = attnproc.SlicedAttnProcessor(slice_size=2)
    sliced = plain.but(
        kernel=replace(REFERENCE, run=lambda *args: calls.append(1) or whole(*args))
    )
    torch.testing.assert_close(sliced(attn, x), plain(attn, x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 4
