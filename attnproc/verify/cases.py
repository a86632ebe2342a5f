"""The one table of configurations: every processor class in every option that its family has.

A case is a class and a line of options, such as `AttnProcessor2_0-cross-bias-qk_rms`. A line that
starts with `!` is compared with the naive oracle, because diffusers is wrong or fails there
(docs/differences.md); one that starts with `~` is compared without gradients.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from attnproc.verify.specs import (
    Axes,
    Case,
    Halves,
    ImageMask,
    Mask,
    ModuleSpec,
    Normal,
    Pairs,
    Same,
    Turns,
)

__all__ = ["CASES", "CLASSES", "Case", "ModuleSpec", "select"]

B, Q, K, C, TEXT, HEADS, DIM = 2, 12, 7, 32, 24, 4, 8
X, CONTEXT, MASK, ROPE = (
    "hidden_states",
    "encoder_hidden_states",
    "attention_mask",
    "image_rotary_emb",
)
IP_CONTEXT = (Normal((B, K, TEXT)), [Normal((B, 4, TEXT))])
IP_TWO = (Normal((B, K, TEXT)), [Normal((B, 1, 4, TEXT)), Normal((B, 2, 3, TEXT))])
BOTH = (X, CONTEXT)


@dataclass(frozen=True)
class Option:
    """A change to a family's base configuration."""

    module: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    init: Mapping[str, Any] = field(default_factory=dict[str, Any])
    setup: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The base configuration of some classes, their own options, and what all of them run."""

    base: Option
    options: Mapping[str, Option] = field(default_factory=dict[str, Option])
    kind: Literal["attention", "flux", "mochi", "multiscale"] = "attention"


def _module(**changes: Any) -> Option:
    return Option(module=changes)


def _inputs(**changes: Any) -> Option:
    return Option(inputs=changes)


def _init(**changes: Any) -> Option:
    return Option(init=changes)


def _mask(form: Any, *over: str) -> Option:
    return Option(inputs={MASK: Mask(form, over)})


COMMON = {
    "self": Option(),
    "cross": Option({"cross_attention_dim": TEXT}, {CONTEXT: Normal((B, K, TEXT))}),
    "grid": Option({"norm_num_groups": 8}, {X: Normal((B, C, 3, 4))}),
    "spatial": Option(
        {"spatial_norm_dim": 4}, {X: Normal((B, C, 3, 4)), "temb": Normal((B, 4, 2, 2))}
    ),
    "residual": _module(residual_connection=True, rescale_output_factor=1.7),
    "ln_cross": _module(cross_attention_norm="layer_norm"),
    "gn_cross": _module(cross_attention_norm="group_norm", cross_attention_norm_num_groups=4),
    "group_norm": _module(norm_num_groups=8),
    "qk_layer": _module(qk_norm="layer_norm"),
    "qk_plain": _module(qk_norm="layer_norm", elementwise_affine=False),
    "qk_fp32": _module(qk_norm="fp32_layer_norm"),
    "qk_rms": _module(qk_norm="rms_norm"),
    "qk_l2": _module(qk_norm="l2"),
    "qk_heads": _module(qk_norm="layer_norm_across_heads", kv_heads=HEADS),
    "qk_rms_heads": _module(qk_norm="rms_norm_across_heads", kv_heads=HEADS),
    "no_qk": _module(qk_norm=None),
    "no_scale": _module(scale_qk=False),
    "gqa": _module(kv_heads=2),
    "mqa": _module(kv_heads=1),
    "causal": _module(is_causal=True),
    "upcast": _module(upcast_attention=True, upcast_softmax=True),
    "qkv_bias": _module(bias=True),
    "no_out_bias": _module(out_bias=False),
    "wide": Option({"query_dim": 40}, {X: Normal((B, Q, 40))}),
    "pre_only": _module(context_pre_only=True),
    "dropout": Option({"dropout": 0.5}, setup=("train",)),
    "fused": Option(setup=("fuse",)),
    "keys": _mask("keys"),
    "bool3": _mask("bool3"),
    "bias": _mask("bias"),
    "bias_q": _mask("bias_q"),
    "bias_heads": _mask("bias_heads"),
    "pag2": _inputs(hidden_states=Normal((4, Q, C))),
    "pag3": _inputs(hidden_states=Normal((6, Q, C))),
    "pag2_bias": Option(inputs={X: Normal((4, Q, C)), MASK: Mask("bias", batch=2)}),
    "pag3_bias": Option(inputs={X: Normal((6, Q, C)), MASK: Mask("keys", batch=4)}),
    "pag2_grid": Option({"norm_num_groups": 8}, {X: Normal((4, C, 3, 4))}),
    "pag3_grid": Option({"norm_num_groups": 8}, {X: Normal((6, C, 3, 4))}),
    "rope": _inputs(image_rotary_emb=Pairs(DIM)),
    "scale": _inputs(scale=0.5),
}

PLAIN = Family(
    Option({"query_dim": C, "heads": HEADS, "dim_head": DIM}, {X: Normal((B, Q, C))}),
    {
        "slice1": _init(slice_size=1),
        "slice2": _init(slice_size=2),
        "slice3": _init(slice_size=3),
        "slice9": _init(slice_size=9),
        "frames": Option(init={"batch_size": 2}, inputs={X: Normal((6, Q, C))}),
        "frames1": Option(init={"batch_size": 1}, inputs={X: Normal((3, Q, C))}),
        "frames_text": _inputs(encoder_hidden_states=Normal((6, K, TEXT))),
        "text_dim": _module(cross_attention_dim=TEXT),
    },
)
CUSTOM = Family(
    Option(PLAIN.base.module, PLAIN.base.inputs, {"hidden_size": C}),
    {
        "cross": Option(
            COMMON["cross"].module, COMMON["cross"].inputs, {"cross_attention_dim": TEXT}
        ),
        "q_out": _init(train_q_out=True),
        "no_q_out": _init(train_q_out=False),
        "no_kv": _init(train_kv=False),
        "no_bias": _init(out_bias=False),
        "own_dropout": Option(init={"dropout": 0.5}, setup=("train",)),
    },
)
LORA = Family(
    Option(PLAIN.base.module, PLAIN.base.inputs, {"hidden_size": C}),
    {
        "cross": CUSTOM.options["cross"],
        "alpha": _init(rank=2, network_alpha=5.0),
    },
)
IMAGE_PROMPT = Family(
    Option(
        {**PLAIN.base.module, "cross_attention_dim": TEXT},
        {X: Normal((B, Q, C)), CONTEXT: IP_CONTEXT},
        {"hidden_size": C, "cross_attention_dim": TEXT},
    ),
    {
        "one": Option(),
        "tokens": _init(num_tokens=4),
        "two": Option(init={"num_tokens": (4, 3), "scale": [0.6, 1.3]}, inputs={CONTEXT: IP_TWO}),
        "off": _init(scale=0.0),
        "images": _inputs(encoder_hidden_states=(Normal((B, K, TEXT)), [Normal((B, 2, 4, TEXT))])),
        "joined": _inputs(encoder_hidden_states=Normal((B, K + 4, TEXT))),
        "masked": _inputs(
            encoder_hidden_states=(Normal((B, K, TEXT)), [Normal((B, 1, 4, TEXT))]),
            ip_adapter_masks=[ImageMask((1, 1, 6, 8))],
        ),
        "mask_tensor": _inputs(
            encoder_hidden_states=(Normal((B, K, TEXT)), [Normal((B, 1, 4, TEXT))]),
            ip_adapter_masks=ImageMask((1, 1, 9, 12)),
        ),
        "two_masked": Option(
            init={"num_tokens": (4, 3), "scale": [0.6, [1.3, 0.4]]},
            inputs={
                CONTEXT: IP_TWO,
                "ip_adapter_masks": [ImageMask((1, 1, 6, 8)), ImageMask((1, 2, 6, 8))],
            },
        ),
        "some_masked": Option(
            init={"num_tokens": (4, 3), "scale": [0.6, [0.0, 0.4]]},
            inputs={
                CONTEXT: IP_TWO,
                "ip_adapter_masks": [None, ImageMask((1, 2, 6, 8))],
            },
        ),
        "odd_mask": _inputs(
            hidden_states=Normal((B, 10, C)),
            encoder_hidden_states=(Normal((B, K, TEXT)), [Normal((B, 1, 4, TEXT))]),
            ip_adapter_masks=[ImageMask((1, 1, 8, 8))],
        ),
    },
)
ADDED_BASE = Option(
    {
        **PLAIN.base.module,
        "cross_attention_dim": C,
        "added_kv_proj_dim": TEXT,
        "norm_num_groups": 8,
        "bias": True,
    },
    {X: Normal((B, C, 3, 4)), CONTEXT: Normal((B, K, TEXT))},
)
ADDED = Family(
    ADDED_BASE,
    {
        "text": Option(),
        "alone": Option({"added_kv_proj_dim": C}, {CONTEXT: None}),
        "flat": _inputs(hidden_states=Normal((B, C, Q))),
        "only_cross": _module(only_cross_attention=True),
        "same_length": _inputs(encoder_hidden_states=Normal((B, Q, TEXT))),
        "ln_cross": Option(
            {"cross_attention_norm": "layer_norm", "added_kv_proj_dim": C},
            {CONTEXT: Normal((B, K, C))},
        ),
        "spatial": Option({"spatial_norm_dim": 4}, {"temb": Normal((B, 4, 2, 2))}),
        "slice1": _init(slice_size=1),
        "slice3": _init(slice_size=3),
        "lora": _init(hidden_size=C, cross_attention_dim=TEXT),
        "alpha": LORA.options["alpha"],
    },
)
JOINT = Family(
    Option(
        {
            **PLAIN.base.module,
            "added_kv_proj_dim": C,
            "out_dim": C,
            "context_pre_only": False,
            "bias": True,
        },
        {X: Normal((B, Q, C)), CONTEXT: Normal((B, 5, C))},
    ),
    {
        "text": Option(),
        "alone": Option({"added_kv_proj_dim": None, "context_pre_only": None}, {CONTEXT: None}),
        "narrow": Option(
            {"added_kv_proj_dim": TEXT, "out_context_dim": TEXT}, {CONTEXT: Normal((B, 5, TEXT))}
        ),
        "keys": _mask("keys", *BOTH),
        "bias": _mask("bias", *BOTH),
        "bias_q": _mask("bias_heads", *BOTH),
        "pag2": _inputs(hidden_states=Normal((4, Q, C)), encoder_hidden_states=Normal((4, 5, C))),
        "pag3": _inputs(hidden_states=Normal((6, Q, C)), encoder_hidden_states=Normal((6, 5, C))),
        "pag2_grid": _inputs(
            hidden_states=Normal((4, C, 3, 4)), encoder_hidden_states=Normal((4, 5, C))
        ),
        "pag3_grid": _inputs(
            hidden_states=Normal((6, C, 3, 4)), encoder_hidden_states=Normal((6, 5, C))
        ),
        "grid": _inputs(hidden_states=Normal((B, C, 3, 4))),
        "ip": Option(
            init={"hidden_size": C, "ip_hidden_states_dim": 20, "head_dim": DIM},
            inputs={"ip_hidden_states": Normal((B, 4, 20)), "temb": Normal((B, 16))},
        ),
        "no_ip": Option(init={"hidden_size": C, "ip_hidden_states_dim": 20, "head_dim": DIM}),
        "small_temb": _init(timesteps_emb_dim=16),
        "louder": _init(scale=1.5),
        "off": _init(scale=0.0),
    },
)
AURA = Family(
    Option(
        {
            **JOINT.base.module,
            "qk_norm": "fp32_layer_norm",
            "bias": False,
            "added_proj_bias": False,
            "out_bias": False,
        },
        JOINT.base.inputs,
    ),
    JOINT.options,
)
FLUX = Family(
    Option(
        {
            "query_dim": C,
            "heads": HEADS,
            "dim_head": DIM,
            "out_dim": C,
            "bias": True,
            "context_pre_only": False,
            "added_kv_proj_dim": C,
            "eps": 1e-6,
        },
        {X: Normal((B, Q, C)), CONTEXT: Normal((B, 5, C))},
    ),
    {
        "double": Option(),
        "single": Option(
            {"added_kv_proj_dim": None, "context_pre_only": None, "pre_only": True},
            {CONTEXT: None},
        ),
        "narrow": Option({"added_kv_proj_dim": TEXT}, {CONTEXT: Normal((B, 5, TEXT))}),
        "no_added_bias": _module(added_proj_bias=False, out_bias=False),
        "rope": _inputs(image_rotary_emb=Pairs(DIM, BOTH)),
        "mask": _mask("bool4", *BOTH),
        "ip": Option(
            init={"hidden_size": C, "cross_attention_dim": 20},
            inputs={"ip_hidden_states": [Normal((B, 4, 20))]},
        ),
        "ip_images": Option(
            init={"hidden_size": C, "cross_attention_dim": 20, "scale": 0.7},
            inputs={"ip_hidden_states": [Normal((B, 2, 4, 20))]},
        ),
        "ip_two": Option(
            init={
                "hidden_size": C,
                "cross_attention_dim": 20,
                "num_tokens": (4, 3),
                "scale": [0.6, 1.3],
            },
            inputs={"ip_hidden_states": [Normal((B, 4, 20)), Normal((B, 3, 20))]},
        ),
    },
    kind="flux",
)
COGVIDEO = Family(
    Option(
        {**PLAIN.base.module, "bias": True, "qk_norm": "layer_norm", "eps": 1e-6},
        JOINT.base.inputs,
    ),
    {
        "text": Option(),
        "cross": _module(cross_attention_dim=C),
        "bias": _mask("bias", *BOTH),
        "keys": _mask("keys", *BOTH),
        "bias_q": _mask("bias_heads", *BOTH),
    },
)
ALLEGRO = Family(
    Option(
        {"query_dim": C, "heads": HEADS, "dim_head": 12, "bias": True},
        {X: Normal((B, Q, C))},
    ),
    {"rope": _inputs(image_rotary_emb=Axes(12, (2, 3, 2)))},
)
HUNYUAN = Family(
    Option({**PLAIN.base.module, "bias": True, "qk_norm": "layer_norm"}, PLAIN.base.inputs)
)
LUMINA = Family(
    Option(
        {
            **PLAIN.base.module,
            "kv_heads": 2,
            "qk_norm": "layer_norm_across_heads",
            "out_bias": False,
        },
        {X: Normal((B, Q, C)), CONTEXT: Same(X), MASK: Mask("keys")},
        setup=("bare_out",),
    ),
    {
        "cross": COMMON["cross"],
        "grid": _inputs(
            hidden_states=Normal((B, C, 3, 4)), encoder_hidden_states=Normal((B, Q, C))
        ),
        "mha": _module(kv_heads=HEADS),
        "rope": _inputs(query_rotary_emb=Turns(DIM), key_rotary_emb=Turns(DIM)),
        "query_rope": _inputs(query_rotary_emb=Turns(DIM)),
        "base": _inputs(base_sequence_length=6),
        "no_mask": _inputs(attention_mask=None),
        "ones": _mask("ones"),
    },
)
MOCHI = Family(
    Option(
        {
            **PLAIN.base.module,
            "added_kv_proj_dim": TEXT,
            "added_proj_bias": False,
            "out_dim": C,
            "out_context_dim": TEXT,
        },
        {X: Normal((B, Q, C)), CONTEXT: Normal((B, 5, TEXT)), MASK: Mask("prefix", (CONTEXT,))},
    ),
    {
        "padded": Option(),
        "whole": _mask("ones", CONTEXT),
        "scattered": _mask("gaps", CONTEXT),
        "no_mask": _inputs(attention_mask=None),
        "rope": _inputs(image_rotary_emb=Turns(DIM, HEADS)),
        "eps": _module(eps=1e-3),
    },
    kind="mochi",
)
MOCHI_VAE = Family(
    Option({**PLAIN.base.module, "qk_norm": "l2", "is_causal": True}, PLAIN.base.inputs),
    {
        "frames": Option(),
        "still": _inputs(hidden_states=Normal((6, 1, C))),
        "open": _module(is_causal=False),
        "one_query": _inputs(hidden_states=Normal((B, 1, C))),
    },
)
AUDIO = Family(
    Option({**PLAIN.base.module, "out_bias": False}, PLAIN.base.inputs),
    {
        "rope": _inputs(rotary_emb=Halves(4)),
        "whole_rope": _inputs(rotary_emb=Halves(DIM)),
        "grid": _inputs(hidden_states=Normal((B, C, 3, 4))),
    },
)
SANA = Family(PLAIN.base)
MULTISCALE = Family(
    Option({"in_channels": 16, "out_channels": 16}, {X: Normal((B, 16, 3, 4))}),
    {
        "large": Option(),
        "small": _inputs(hidden_states=Normal((B, 16, 2, 3))),
        "exact": _inputs(hidden_states=Normal((B, 16, 2, 4))),
        "rms": _module(norm_type="rms_norm"),
        "train": Option(setup=("train",)),
        "two_scales": _module(kernel_sizes=(3, 5)),
        "more_heads": _module(mult=2.0),
        "residual": _module(residual_connection=True),
        "to_more": _module(out_channels=24),
    },
    kind="multiscale",
)

# fmt: off
_QK = (
    "qk_layer", "qk_plain", "qk_fp32", "qk_rms", "qk_l2",
)
_UNET = (
    "self", "self bias", "self bias_q", "self bias_heads", "self qkv_bias no_out_bias",
    "self wide", "self dropout", "cross", "cross bias", "cross ln_cross",
    "cross gn_cross bias", "grid residual", "grid cross bias residual", "spatial",
    "spatial grid residual",
)
_BOOLS = (
    "self bool3", "cross keys", "cross bool3",
)
_WRONG_QK = (
    "! self qk_layer", "! cross bias qk_rms", "! self qk_l2", "! grid qk_fp32",
)
_ADDED = (
    "text", "text bias", "text residual", "text gn_cross bias", "ln_cross", "flat", "alone",
    "only_cross", "same_length", "text upcast", "text dropout", "! same_length bias",
    "! only_cross bias",
)
_CUSTOM = (
    "self", "self q_out", "self no_q_out", "self no_kv", "cross", "cross no_kv q_out",
    "cross no_q_out ln_cross", "cross q_out no_bias gn_cross", "cross q_out own_dropout",
    "! cross bias",
)
_LORA = (
    "self", "cross", "cross alpha", "cross bias alpha scale", "self qkv_bias alpha",
)
_IP = (
    "one", "one bias", "one tokens joined", "off", "images", "two", "two grid residual bias",
    "one ln_cross", "one spatial", "one dropout",
)
_IP_MASKS = (
    "masked", "mask_tensor", "two_masked grid", "some_masked", "odd_mask",
)
_JOINT = (
    "text", "text pre_only", "narrow", "text qk_rms", "text qk_layer pre_only",
    "narrow qk_fp32", "text dropout",
)
_JOINT_WRONG = (
    "! text keys", "! text bias qk_rms", "! text bias_q", "! text no_scale",
)
_PAG = (
    "! {n} qk_layer", "! {n} no_scale", "! {n} gqa", "! {n}_bias qk_rms",
)
_AURA = (
    "text", "alone", "narrow", "text qk_rms", "text no_qk", "text no_scale", "text dropout",
    "! text pre_only",
)
_FLUX = (
    "double", "double rope", "double rope mask", "narrow rope no_added_bias", "double dropout",
    "single", "single rope", "single rope mask",
)
_FLUX_FUSED = (
    "double rope fused", "single rope fused", "narrow fused",
)
_HUNYUAN = (
    "self", "self rope", "self rope bias", "self no_qk rope keys", "self qk_rms",
    "grid residual rope", "spatial", "cross rope", "cross keys ln_cross", "self dropout",
    "! self rope no_scale",
)
_COGVIDEO = (
    "text", "text rope", "text no_qk", "cross rope", "text rope dropout", "! text no_scale",
)
_SANA = (
    "self", "! self keys", "! self bias", "self qkv_bias no_out_bias", "self dropout",
)
# fmt: on


def _with(tail: str, lines: tuple[str, ...]) -> tuple[str, ...]:
    """`lines` with further options behind."""
    return tuple(f"{line} {tail}" for line in lines)


def _each(names: tuple[str, ...], head: str) -> tuple[str, ...]:
    return tuple(f"{head} {name}" for name in names)


def _wrong_masks(lines: tuple[str, ...]) -> tuple[str, ...]:
    """`lines` with a `!` before those that have a mask to add."""
    masks = {"bias", "bias_q", "bias_heads"}
    return tuple(f"! {line}" if masks & set(line.split()) else line for line in lines)


def _pag(name: str) -> tuple[str, ...]:
    return tuple(line.format(n=name) for line in _PAG)


def _pag_plain(name: str) -> tuple[str, ...]:
    return (
        name,
        f"{name} residual qkv_bias",
        f"{name} group_norm",
        f"{name}_bias",
        f"{name}_grid residual",
        *_pag(name),
    )


def _pag_joint(name: str) -> tuple[str, ...]:
    return (
        name,
        f"{name} pre_only",
        f"! {name} qk_rms",
        f"! {name} keys",
        f"! {name} no_scale bias",
        f"! {name}_grid",
        f"! {name}_grid pre_only qk_layer",
    )


_TABLE: dict[str, tuple[Family, tuple[str, ...]]] = {
    "AttnProcessor": (
        PLAIN,
        (*_UNET, "self upcast", "self no_scale", *_WRONG_QK, "! self gqa", "! self causal"),
    ),
    "AttnProcessor2_0": (
        PLAIN,
        (
            *_UNET,
            *_BOOLS,
            *_each(_QK, "self"),
            "cross bias qk_rms",
            "! self gqa",
            "! cross mqa bias",
            "! self no_scale",
            "! self causal",
        ),
    ),
    "FusedAttnProcessor2_0": (
        PLAIN,
        (
            *_with("fused", (*_UNET[:3], *_UNET[4:], "self qk_rms", "cross keys qk_layer")),
            "! self fused no_scale",
            "! self fused gqa",
        ),
    ),
    "SlicedAttnProcessor": (
        PLAIN,
        (
            *_with("slice2", tuple(line for line in _UNET if "spatial" not in line)),
            "self bias slice1",
            "cross bias slice3",
            "self upcast slice9",
            *_with("slice2", (*_WRONG_QK, "! self gqa", "! spatial")),
        ),
    ),
    "XFormersAttnProcessor": (PLAIN, (*_UNET, "self no_scale", *_WRONG_QK, "! self gqa")),
    "AttnProcessorNPU": (
        PLAIN,
        (
            *_wrong_masks(_UNET),
            "! cross keys",
            *_WRONG_QK,
            "! self no_scale",
        ),
    ),
    "XLAFlashAttnProcessor2_0": (
        PLAIN,
        (*_UNET, "self qk_rms", "cross keys qk_layer", "! self no_scale"),
    ),
    "CrossFrameAttnProcessor": (
        PLAIN,
        (
            "frames",
            "frames1",
            "frames bias",
            "frames bias_q",
            "frames frames_text text_dim",
            "frames frames_text text_dim ln_cross",
            "frames upcast dropout",
            "frames no_scale",
            "! frames frames_text text_dim bias",
            "! frames qk_rms",
        ),
    ),
    "PAGIdentitySelfAttnProcessor2_0": (PLAIN, _pag_plain("pag2")),
    "PAGCFGIdentitySelfAttnProcessor2_0": (PLAIN, _pag_plain("pag3")),
    "AttnAddedKVProcessor": (ADDED, (*_ADDED, "text no_scale", "! text qk_rms")),
    "AttnAddedKVProcessor2_0": (ADDED, (*_ADDED, "! text no_scale", "! text bias qk_rms")),
    "XFormersAttnAddedKVProcessor": (
        ADDED,
        (*_wrong_masks(_ADDED), "text no_scale", "! text qk_rms"),
    ),
    "SlicedAttnAddedKVProcessor": (
        ADDED,
        (*_with("slice3", _ADDED), "text bias slice1", "spatial slice3"),
    ),
    "CustomDiffusionAttnProcessor": (CUSTOM, (*_CUSTOM, "self bias", "cross no_scale upcast")),
    "CustomDiffusionAttnProcessor2_0": (CUSTOM, (*_CUSTOM, "! self bias", "! cross no_scale")),
    "CustomDiffusionXFormersAttnProcessor": (CUSTOM, (*_CUSTOM, "! self bias")),
    "IPAdapterAttnProcessor": (IMAGE_PROMPT, (*_IP, *_IP_MASKS, "one no_scale", "! one qk_rms")),
    "IPAdapterAttnProcessor2_0": (
        IMAGE_PROMPT,
        (*_IP, *_IP_MASKS, "one keys", "! one qk_rms", "! one no_scale"),
    ),
    "IPAdapterXFormersAttnProcessor": (
        IMAGE_PROMPT,
        (*_IP, *_each(_IP_MASKS, "!"), "! one no_scale"),
    ),
    "LoRAAttnProcessor": (LORA, (*_LORA, "self upcast", "grid residual alpha")),
    "LoRAAttnProcessor2_0": (LORA, (*_LORA, "self qk_rms", "grid residual alpha")),
    "LoRAXFormersAttnProcessor": (LORA, (*_LORA, "grid residual alpha")),
    "LoRAAttnAddedKVProcessor": (
        ADDED,
        ("text lora", "text lora alpha", "text bias lora alpha scale", "only_cross lora"),
    ),
    "JointAttnProcessor2_0": (JOINT, (*_JOINT, "alone", "alone qk_rms", *_JOINT_WRONG)),
    "XFormersJointAttnProcessor": (
        JOINT,
        (*_JOINT, "alone", "text no_scale", "! text bias_q", "! text keys", "! text bias qk_rms"),
    ),
    "FusedJointAttnProcessor2_0": (
        JOINT,
        (
            "text fused",
            "text pre_only fused",
            "narrow fused",
            "text dropout fused",
            "! alone fused",
            "! grid fused",
            "! text qk_rms fused",
            "! grid qk_layer pre_only fused",
            *_with("fused", _JOINT_WRONG),
        ),
    ),
    "PAGJointAttnProcessor2_0": (JOINT, _pag_joint("pag2")),
    "PAGCFGJointAttnProcessor2_0": (JOINT, _pag_joint("pag3")),
    "SD3IPAdapterJointAttnProcessor2_0": (
        JOINT,
        (
            *_with("ip small_temb", _JOINT[:-1]),
            "text ip small_temb louder",
            "text ip small_temb off",
            "text no_ip small_temb",
            "alone ip small_temb",
            "! text ip small_temb keys",
        ),
    ),
    "AuraFlowAttnProcessor2_0": (AURA, (*_AURA, "! text keys")),
    "FusedAuraFlowAttnProcessor2_0": (AURA, _with("fused", _AURA)),
    "FluxAttnProcessor2_0": (FLUX, (*_FLUX, *_FLUX_FUSED)),
    "FusedFluxAttnProcessor2_0": (FLUX, (*_FLUX_FUSED, "double rope", "double mask fused")),
    "FluxSingleAttnProcessor2_0": (FLUX, (*_FLUX[5:], "single fused", "double rope")),
    "XLAFluxFlashAttnProcessor2_0": (FLUX, ("double rope", "single rope", "single fused")),
    "FluxIPAdapterJointAttnProcessor2_0": (
        FLUX,
        (
            "double ip",
            "double rope ip",
            "double rope ip_two",
            "narrow rope ip_images fused",
            "double mask ip",
            "double rope ip dropout",
        ),
    ),
    "CogVideoXAttnProcessor2_0": (
        COGVIDEO,
        (*_COGVIDEO, "text rope bias", "text keys", "text bias_q", "text no_qk rope"),
    ),
    "FusedCogVideoXAttnProcessor2_0": (
        COGVIDEO,
        (*_with("fused", _COGVIDEO[:3]), "! text rope bias fused", "! text no_qk rope fused"),
    ),
    "AllegroAttnProcessor2_0": (
        ALLEGRO,
        (
            "self",
            "self rope",
            "self rope bias",
            "cross keys",
            "cross rope",
            "grid residual rope",
            "self dropout rope",
            "cross ln_cross",
            "! self rope qk_rms",
        ),
    ),
    "HunyuanAttnProcessor2_0": (HUNYUAN, (*_HUNYUAN, "! self rope gqa")),
    "FusedHunyuanAttnProcessor2_0": (HUNYUAN, _with("fused", _HUNYUAN)),
    "PAGHunyuanAttnProcessor2_0": (
        HUNYUAN,
        ("pag2", "pag2 rope", "pag2_bias rope", "pag2_grid rope residual", "! pag2 no_scale"),
    ),
    "PAGCFGHunyuanAttnProcessor2_0": (
        HUNYUAN,
        ("pag3", "pag3 rope", "pag3_bias rope", "! pag3_grid rope residual", "! pag3 no_scale"),
    ),
    "LuminaAttnProcessor2_0": (
        LUMINA,
        (
            "self",
            "self rope",
            "self rope base",
            "self ones rope base",
            "mha rope",
            "mqa no_qk rope",
            "cross",
            "cross query_rope",
            "cross query_rope mqa no_qk",
            "grid",
            "self rope base no_scale",
            "! self rope no_mask",
            "! cross query_rope no_scale",
        ),
    ),
    "MochiAttnProcessor2_0": (
        MOCHI,
        (
            "padded",
            "padded rope",
            "padded rope pre_only",
            "whole rope",
            "padded qkv_bias rope eps",
            "padded dropout",
            "! scattered rope",
            "! no_mask rope",
        ),
    ),
    "MochiVaeAttnProcessor2_0": (
        MOCHI_VAE,
        (
            "frames",
            "frames residual",
            "open",
            "open bias",
            "open keys qk_layer",
            "open cross bias",
            "cross",
            "still",
            "still residual",
            "frames no_qk",
            "! frames bias",
            "! cross one_query open",
            "! open no_scale",
        ),
    ),
    "StableAudioAttnProcessor2_0": (
        AUDIO,
        (
            "self",
            "self rope",
            "self rope keys",
            "self whole_rope bias",
            "cross gqa",
            "cross gqa rope keys",
            "cross mqa rope",
            "self rope qk_layer gqa",
            "grid residual",
            "cross ln_cross bias",
            "self rope dropout",
            "! self rope no_scale",
        ),
    ),
    "SanaLinearAttnProcessor2_0": (
        SANA,
        (*_SANA, "self qk_rms_heads", "self qk_heads", "cross", "! cross bias qk_rms_heads"),
    ),
    "PAGIdentitySanaLinearAttnProcessor2_0": (
        SANA,
        ("pag2", "pag2 qkv_bias", "! pag2 qk_rms_heads", "! pag2_bias"),
    ),
    "PAGCFGSanaLinearAttnProcessor2_0": (
        SANA,
        ("pag3", "pag3 qkv_bias", "! pag3 qk_rms_heads", "! pag3_bias"),
    ),
    "SanaMultiscaleAttnProcessor2_0": (
        MULTISCALE,
        (
            "large",
            "small",
            "exact",
            "large rms residual",
            "small rms residual",
            "large train",
            "small two_scales",
            "large two_scales",
            "large more_heads to_more",
        ),
    ),
}

CLASSES: tuple[str, ...] = tuple(_TABLE)


def _case(cls: str, family: Family, line: str) -> Case:
    marks = {"!", "~"} & set(line.split())
    names = [name for name in line.split() if name not in marks]
    options = [family.options.get(name) or COMMON[name] for name in names]
    parts = [family.base, *options]
    return Case(
        id=f"{cls}-{'-'.join(names)}",
        cls=cls,
        init=_merge(part.init for part in parts),
        module=ModuleSpec(family.kind, _merge(part.module for part in parts)),
        inputs=_merge(part.inputs for part in parts),
        setup=tuple(step for part in parts for step in part.setup),
        compare="naive" if "!" in marks else "diffusers",
        grads="~" not in marks,
        tags=frozenset(names),
    )


def _merge(parts: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        merged.update(part)
    return merged


CASES: tuple[Case, ...] = tuple(
    _case(cls, family, line) for cls, (family, lines) in _TABLE.items() for line in lines
)


def select(pattern: str | None = None) -> tuple[Case, ...]:
    """The cases whose id holds `pattern`, or matches it when it has wildcards."""
    if not pattern:
        return CASES
    wild = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
    return tuple(case for case in CASES if fnmatch.fnmatchcase(case.id, wild))
