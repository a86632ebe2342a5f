"""Every class with every part, and pairs of parts on one class of each family."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnproc
from attnproc import Processor, pack, unpack
from attnproc.capture import Capture, Maps
from attnproc.on import kind_of
from attnproc.verify.build import Setting, build
from attnproc.verify.cases import CASES

pytest_plugins = ("fakes",)
pytestmark = pytest.mark.usefixtures("fake_xformers", "fake_torch_npu", "fake_torch_xla")

NAMES = sorted(attnproc.presets.__all__)
FAMILIES = [
    "AllegroAttnProcessor2_0",
    "AttnAddedKVProcessor2_0",
    "AttnProcessor2_0",
    "AuraFlowAttnProcessor2_0",
    "CogVideoXAttnProcessor2_0",
    "FusedFluxAttnProcessor2_0",
    "FusedHunyuanAttnProcessor2_0",
    "FusedJointAttnProcessor2_0",
    "LuminaAttnProcessor2_0",
    "MochiAttnProcessor2_0",
    "MochiVaeAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0",
    "SanaMultiscaleAttnProcessor2_0",
    "StableAudioAttnProcessor2_0",
]
# What a class has by its name already can't be given twice.
OWN = {"pag": "PAG", "cross_frame": "CrossFrame", "custom_diffusion": "CustomDiffusion"}
PART: dict[str, Callable[[Processor, nn.Module], Processor]] = {
    "lora": lambda p, attn: p.with_lora(attn, "style", rank=2, weight=0.0),
    "custom_diffusion": lambda p, attn: p.with_custom_diffusion(attn, out_bias=_biased(attn)),
    "ip": lambda p, attn: p.with_ip_adapter(attn, 20, 3, 0.0),
    "pag": lambda p, attn: p.with_pag(2),
    "slicing": lambda p, attn: p.with_slicing(3),
    "cross_frame": lambda p, attn: p.with_cross_frame(_rows(p)),
    "backend": lambda p, attn: p.with_backend("reference"),
    "capture": lambda p, attn: p.with_capture(Capture(Maps(part=(0, 1)), "layer")),
}
# To the bit where nothing is computed otherwise, else to rounding.
EXACT = {"lora", "ip", "capture"}


def _biased(attn: nn.Module) -> bool:
    out = getattr(attn, "to_out", None)
    out = out[0] if isinstance(out, nn.ModuleList) else out
    return getattr(out, "bias", None) is not None


def _rows(processor: Processor) -> int:
    return processor.rows


def _keys(processor: Processor) -> list[str]:
    return list(processor.state_dict()) if isinstance(processor, nn.Module) else []


def _setting(name: str) -> Setting:
    case = next(c for c in CASES if c.cls == name)
    setting = build(case, "ours", torch.float32, own_modules=True)
    setting.processor.__dict__["rows"] = setting.inputs["hidden_states"].shape[0]
    return setting


def _run(setting: Setting, processor: Processor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    out = processor(setting.attn, **inputs)
    return out if isinstance(out, tuple) else (out,)


def _inputs(setting: Setting, processor: Processor) -> dict[str, Any]:
    """The case's inputs, with states for the prompts that a part added."""
    inputs = dict(setting.inputs)
    layers = getattr(processor, "to_k_ip", None)
    prompts = len(layers) if isinstance(layers, nn.ModuleList) else 0
    rows = inputs["hidden_states"].shape[0]
    torch.manual_seed(0)
    added = [torch.randn(rows, 1, 3, 20)]
    context = inputs.get("encoder_hidden_states")
    if isinstance(context, tuple) and len(context[1]) < prompts:
        inputs["encoder_hidden_states"] = (context[0], [*context[1], *added])
    elif "ip_hidden_states" in inputs and len(inputs["ip_hidden_states"]) < prompts:
        inputs["ip_hidden_states"] = [*inputs["ip_hidden_states"], *added]
    elif prompts == 1 and not isinstance(context, tuple) and "ip_hidden_states" not in inputs:
        inputs["ip_hidden_states"] = added
    return inputs


def _twice(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor):
        return torch.cat((value, value)) if value.shape[0] == rows else value
    if isinstance(value, list | tuple):
        return type(value)(_twice(item, rows) for item in value)
    return value


@torch.no_grad()
def _own_weights(processor: Processor, attn: nn.Module) -> None:
    """Gives custom projections the module's weights, so that they change nothing."""
    for name in ("to_q", "to_k", "to_v", "to_out"):
        custom, layer = (
            getattr(processor, f"{name}_custom_diffusion", None),
            getattr(attn, name, 0),
        )
        if custom is None:
            continue
        pair = [m[0] if isinstance(m, nn.ModuleList) else m for m in (custom, layer)]
        pair[0].weight.copy_(pair[1].weight)
        if pair[0].bias is not None:
            pair[0].bias.copy_(pair[1].bias)


def _close(found: tuple[Tensor, ...], base: tuple[Tensor, ...], exact: bool) -> None:
    assert len(found) == len(base)
    for a, b in zip(found, base, strict=True):
        tolerance = 0.0 if exact else 1e-5 * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def _is_cross(setting: Setting) -> bool:
    context = setting.inputs.get("encoder_hidden_states")
    return context is not None and kind_of(setting.attn) == "cross"


def _refused(name: str, part: str, processor: Processor) -> bool:
    """The rules by which a part can't go on a class."""
    if OWN.get(part, "-") in name:
        return True
    return part == "ip" and "SD3IP" in name


@pytest.mark.parametrize("part", PART)
@pytest.mark.parametrize("name", NAMES)
def test_a_part_on_a_class(name: str, part: str) -> None:
    setting = _setting(name)
    plain = setting.processor
    if _refused(name, part, plain):
        with pytest.raises(ValueError, match=r"already|take it off"):
            PART[part](plain, setting.attn)
        return
    with torch.no_grad():
        base = _run(setting, plain, setting.inputs)

        changed = PART[part](plain, setting.attn)
        if part == "custom_diffusion":
            _own_weights(changed, setting.attn)
        inputs = _inputs(setting, changed)
        rows = inputs["hidden_states"].shape[0]
        if part == "pag" and _is_cross(setting):
            with pytest.raises(ValueError, match="perturbs self attention"):
                _run(setting, changed, inputs)
            return
        if part == "pag":
            if hasattr(changed, "batch_size"):
                changed.batch_size *= 2
            found = _run(setting, changed, {k: _twice(v, rows) for k, v in inputs.items()})
            found = tuple(out[:rows] for out in found)
            if hasattr(changed, "batch_size"):
                changed.batch_size //= 2
        else:
            found = _run(setting, changed, inputs)
        # Only Flux returns prompts apart, zeros here.
        assert all(not out.any() for out in found[len(base) :])
        if part != "custom_diffusion" or not setting.attn.to_q.bias is not None:
            _close(found[: len(base)], base, exact=part in EXACT)

        off = changed.without({"lora": "style"}.get(part, part))
        if part not in plain.names():
            assert off.recipe == plain.recipe
            assert _keys(off) == _keys(plain)
            _close(_run(setting, off, setting.inputs), base, exact=True)


@pytest.mark.parametrize("name", NAMES)
def test_packed_projections_under_a_class(name: str) -> None:
    setting = _setting(name)
    with torch.no_grad():
        base = _run(setting, setting.processor, setting.inputs)
        # A fused module has one product already.
        if getattr(setting.attn, "fused_projections", False):
            with pytest.raises(ValueError, match="fused"):
                pack(setting.attn)
            return
        pack(setting.attn)
        _close(_run(setting, setting.processor, setting.inputs), base, exact=False)
        unpack(setting.attn)
        _close(_run(setting, setting.processor, setting.inputs), base, exact=True)


@pytest.mark.parametrize("pair", list(itertools.combinations(PART, 2)), ids="-".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_parts_in_either_order(name: str, pair: tuple[str, str]) -> None:
    setting = _setting(name)
    plain, attn = setting.processor, setting.attn
    with torch.no_grad():
        results = []
        for order in (pair, pair[::-1]):
            torch.manual_seed(1)
            processor = plain
            for part in order:
                processor = PART[part](processor, attn)
            _reseed(processor)
            assert set(processor.names()) >= {
                {"lora": "style"}.get(p, p) for p in pair if p != "backend"
            }
            inputs = _inputs(setting, processor)
            rows = inputs["hidden_states"].shape[0]
            inputs = {k: _twice(v, rows) for k, v in inputs.items()}
            processor.__dict__["rows"] = 2 * rows
            results.append(_run(setting, processor, inputs))
    _close(results[0], results[1], exact=True)


@torch.no_grad()
def _reseed(processor: Processor) -> None:
    """The same weights by name, whatever order they were made in; all weights on."""
    held = processor.named_parameters() if isinstance(processor, nn.Module) else ()
    for name, parameter in sorted(held):
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    processor.__dict__["lora_weights"] = {"style": 0.7}
    if isinstance(getattr(processor, "scale", None), list):
        processor.scale = [0.6] * len(processor.scale)


def test_the_page_of_presets_is_up_to_date() -> None:
    script = Path(__file__).parents[1] / "docs" / "make_presets.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
