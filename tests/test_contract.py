"""Signatures, state keys, attributes and returns are diffusers'; copies and pickles work alike."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CLASSES, FIRST, Case, each
from torch import nn

import attnproc
from attnproc.verify.build import build, diffusers_found
from attnproc.verify.references import LORA_BASES, reference_class

pytestmark = pytest.mark.usefixtures("stand_ins")

OWN = not diffusers_found()
needs_diffusers = pytest.mark.skipif(OWN, reason="diffusers is not here")
LORA = [
    ("hidden_size", None),
    ("cross_attention_dim", None),
    ("rank", 4),
    ("network_alpha", None),
]
LORA_ARGUMENTS = dict.fromkeys(LORA_BASES, LORA) | {
    "LoRAXFormersAttnProcessor": [*LORA[:3], ("attention_op", None), LORA[3]]
}
# diffusers' shim accepts a partition_spec and ignores it.
XLA_FLUX = "XLAFluxFlashAttnProcessor2_0"
WITHOUT_LORA = [cls for cls in CLASSES if cls not in LORA_BASES]
EXTRA = {"temb", "ip_hidden_states", "ip_adapter_masks", "attention_mask"}
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = inspect.signature(function).parameters.values()
    return [parameter for parameter in found if parameter.name != "self"]


def positional(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    kept = parameters(function)
    return [(p.name, p.default) for p in kept if p.kind is p.POSITIONAL_OR_KEYWORD]


def constructor(cls: type) -> list[tuple[str, Any]]:
    return positional(cls.__init__) if "__init__" in dir(cls) else []


@needs_diffusers
@pytest.mark.parametrize("cls", WITHOUT_LORA)
def test_constructor(cls: str) -> None:
    theirs = reference_class(cls)
    want = [] if theirs.__init__ in (object.__init__, nn.Module.__init__) else constructor(theirs)
    if cls == XLA_FLUX:
        want = [("partition_spec", None)]
    assert constructor(getattr(attnproc, cls)) == want


@pytest.mark.parametrize("cls", CLASSES)
def test_constructor_takes_nothing_unnamed(cls: str) -> None:
    found = inspect.signature(getattr(attnproc, cls)).parameters.values()
    assert not [parameter.name for parameter in found if parameter.kind in VARIADIC]


@pytest.mark.parametrize("cls", LORA_BASES)
def test_constructor_of_lora(cls: str) -> None:
    assert constructor(getattr(attnproc, cls)) == LORA_ARGUMENTS[cls]


@needs_diffusers
@pytest.mark.parametrize("cls", WITHOUT_LORA)
def test_call(cls: str) -> None:
    ours, theirs = getattr(attnproc, cls).__call__, reference_class(cls).__call__
    mine, want = positional(ours), positional(theirs)
    assert [name for name, _ in mine] == [name for name, _ in want]
    for (name, default), (_, wanted) in zip(mine, want, strict=True):
        # An argument that diffusers can't do without may be left out here.
        assert default == wanted or (wanted is inspect.Parameter.empty and default is None), name


@needs_diffusers
@pytest.mark.parametrize("cls", WITHOUT_LORA)
def test_call_tolerates_what_diffusers_tolerates(cls: str) -> None:
    ours, theirs = getattr(attnproc, cls).__call__, reference_class(cls).__call__
    variadic = [
        [p.kind for p in parameters(call) if p.kind in VARIADIC] for call in (ours, theirs)
    ]
    assert variadic[0] == variadic[1]
    named = {p.name for p in parameters(ours) if p.kind is p.KEYWORD_ONLY}
    assert named <= EXTRA


@pytest.mark.parametrize("cls", LORA_BASES)
def test_call_of_lora_names_its_scale(cls: str) -> None:
    mine = dict(positional(getattr(attnproc, cls).__call__))
    assert list(mine)[:4] == [
        "attn",
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
    ]
    assert mine["scale"] == 1.0


@needs_diffusers
@each(FIRST.values())
def test_state_keys(case: Case) -> None:
    mine, theirs = (build(case, side, torch.float32).processor for side in ("ours", "theirs"))
    assert isinstance(mine, nn.Module) == isinstance(theirs, nn.Module)
    if not isinstance(theirs, nn.Module):
        return
    assert list(mine.named_buffers()) == []
    theirs.load_state_dict(mine.state_dict())
    mine.load_state_dict(theirs.state_dict())


@needs_diffusers
@each(case for case in FIRST.values() if case.cls not in LORA_BASES)
def test_attributes(case: Case) -> None:
    mine, theirs = (build(case, side, torch.float32).processor for side in ("ours", "theirs"))
    written = {n: v for n, v in vars(theirs).items() if not n.startswith("_") and n != "training"}
    assert {name: getattr(mine, name) for name in written} == written
    assert mine._attention_backend is None


@needs_diffusers
@each(FIRST.values())
def test_return_type(case: Case) -> None:
    mine, theirs = (build(case, side, torch.float32) for side in ("ours", "theirs"))
    outputs = [s.processor(s.attn, **s.inputs) for s in (mine, theirs)]
    assert type(outputs[0]) is type(outputs[1])


@each(FIRST.values())
def test_copy_and_pickle(case: Case) -> None:
    setting = build(case, "ours", torch.float32, own_modules=OWN)
    processor, want = setting.processor, setting.call()
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        setting.processor = twin
        torch.testing.assert_close(setting.call(), want, rtol=0, atol=0)
        assert repr(twin) == repr(processor)


@pytest.mark.parametrize("cls", CLASSES)
def test_repr(cls: str) -> None:
    assert repr(getattr(attnproc, cls)(**FIRST[cls].init)).startswith(f"{cls}(")


@pytest.mark.parametrize("cls", LORA_BASES)
def test_lora_without_arguments_is_the_plain_processor(cls: str) -> None:
    setting = build(FIRST[cls], "ours", torch.float32, own_modules=OWN)
    outputs = []
    for name in (cls, LORA_BASES[cls]):
        setting.processor = getattr(attnproc, name)()
        outputs.append(setting.call())
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
