"""One graph for every processor, one compilation for all layers, none again for a new scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, FIRST, Case, each, select
from torch import nn

from attnproc.verify.build import Setting, build, diffusers_found
from attnproc.verify.check import graph_breaks

pytestmark = pytest.mark.usefixtures("stand_ins", "fresh_compiler")

OWN = not diffusers_found()
RICHEST = {case.cls: case for case in sorted(CASES, key=lambda case: len(case.tags))}
SCALED = {
    "IPAdapterAttnProcessor-one": "list",
    "IPAdapterAttnProcessor2_0-two": "list",
    "IPAdapterXFormersAttnProcessor-one": "list",
    "FluxIPAdapterJointAttnProcessor2_0-double-rope-ip_two": "list",
    "SD3IPAdapterJointAttnProcessor2_0-text-ip-small_temb": "attribute",
    "LoRAAttnProcessor-cross-alpha": "call",
    "LoRAAttnProcessor2_0-cross-alpha": "call",
    "LoRAXFormersAttnProcessor-cross-alpha": "call",
    "LoRAAttnAddedKVProcessor-text-lora-alpha": "call",
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(processor: Any, attn: nn.Module, inputs: dict[str, Any]) -> Any:
    return processor(attn, **inputs)


def compiled(settings: list[Setting]) -> None:
    """Run the settings through one compiled function; only the first may be compiled."""
    once = torch.compile(run, backend="eager", fullgraph=True)
    for number, setting in enumerate(settings):
        args = (setting.processor, setting.attn, setting.inputs)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            out = once(*args)
        torch.testing.assert_close(out, run(*args), rtol=1e-4, atol=1e-5)


@each((RICHEST[name] for name in CLASSES), fast=2)
def test_one_graph_in_the_richest_configuration(case: Case) -> None:
    assert graph_breaks(case, OWN) == 0


@pytest.mark.slow
@each(case for case in CASES if case is not RICHEST[case.cls])
def test_one_graph_in_every_configuration(case: Case) -> None:
    assert graph_breaks(case, OWN) == 0


# In the fast set those classes that the test above leaves out.
@each((FIRST[name] for name in reversed(CLASSES)), fast=2)
def test_one_compilation_for_all_layers(case: Case) -> None:
    layers = [replace(case, id=f"{case.id}/{layer}") for layer in range(3)]
    compiled([build(layer, "ours", torch.float32, own_modules=OWN) for layer in layers])


@pytest.mark.parametrize(("name", "where"), SCALED.items())
def test_a_tensor_scale_changes_without_compiling_again(name: str, where: str) -> None:
    case = next(case for case in select(name) if case.id == name)
    settings = [_scaled(case, where, scale) for scale in (0.5, 1.0, 0.25)]
    compiled(settings)
    outputs = [setting.call()[-1 if "Flux" in name else 0] for setting in settings]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(outputs, 2))


def _scaled(case: Case, where: str, scale: float) -> Setting:
    setting = build(case, "ours", torch.float32, own_modules=OWN)
    value = torch.tensor(scale)
    if where == "call":
        setting.inputs["scale"] = value
    elif where == "list":
        setting.processor.scale = [value] * len(setting.processor.scale)
    else:
        setting.processor.scale = value
    return setting
