"""The examples: a few steps each, to a file that `generate` and diffusers load."""

from __future__ import annotations

import importlib
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import numpy as np
import torch
from test_cli import QUICK, done, pixels

import attnproc
from attnproc.app import image_prompt
from attnproc.app.demo import model
from attnproc.weights import load_custom_diffusion, load_ip_adapter, load_lora
from attnproc.weights.files import opened

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINED = {
    "train_lora": load_lora,
    "train_custom_diffusion": load_custom_diffusion,
    "train_ip_adapter": load_ip_adapter,
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The examples on the path; accelerate's state, which is one a process, as at the start."""
    from accelerate.state import AcceleratorState

    monkeypatch.syspath_prepend(EXAMPLES)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def example(name: str) -> Any:
    return importlib.import_module(name)


def train(name: str, out: Path, **options: Any) -> None:
    example(name).main(out=out, **{"steps": 2, "batch": 2, **options})


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, all finite and in half precision."""
    tensors, _ = opened(file)
    assert all(t.dtype == torch.float16 and t.isfinite().all() for t in tensors.values())
    return tensors


# The first is enough for what takes long.
SOON = [
    pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(TRAINED)
]


@pytest.mark.parametrize("name", TRAINED)
def test_a_few_steps_make_a_file_that_loads(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    train(name, out)

    assert tensors_of(out)
    assert out.stat().st_size < 1 << 20
    pipeline: Any = model.load()
    TRAINED[name](pipeline.unet, out)


@pytest.mark.parametrize("name", SOON)
def test_bfloat16_and_checkpointing(name: str, tmp_path: Path) -> None:
    train(name, tmp_path / "a.safetensors", bf16=True, checkpointing=True)
    assert tensors_of(tmp_path / "a.safetensors")


def test_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, on in zip(files, (False, True), strict=True):
        train("train_lora", file, checkpointing=on)
    a, b = (opened(file)[0] for file in files)
    assert all(torch.allclose(a[key], b[key], rtol=0, atol=1e-3) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_compiled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.nn.Module.compile
    # The tracing is what could fail; inductor's own work takes minutes.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_(self, backend="aot_eager")
    )
    torch._dynamo.reset()
    train(name, tmp_path / "a.safetensors", compiled=True)
    assert tensors_of(tmp_path / "a.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_compiled_by_inductor(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    train(name, tmp_path / "a.safetensors", compiled=True, bf16=True, checkpointing=True)
    assert tensors_of(tmp_path / "a.safetensors")


def theirs(pipeline: Any, prompt: str, **inputs: Any) -> np.ndarray:
    seed = [torch.Generator().manual_seed(0)]
    result = pipeline(
        [prompt], num_inference_steps=2, guidance_scale=3.0, generator=seed, **inputs
    )
    return np.asarray(result.images[0]).astype(int)


def test_the_lora_in_generate_and_in_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "style.safetensors"
    train("train_lora", out, rate=0.02)
    pipeline: Any = model.load()
    plain = theirs(pipeline, "rocket")
    pipeline.load_lora_weights(out)
    found = theirs(pipeline, "rocket")

    done("generate", "rocket", "--lora", out, "-o", tmp_path / "a.png", *QUICK)

    assert np.abs(found - plain).max() > 8
    assert np.abs(pixels(tmp_path / "a.png") - found).max() <= 1


@pytest.mark.parametrize("q_out", [False, True])
def test_the_projections_in_generate_and_in_diffusers(q_out: bool, tmp_path: Path) -> None:
    out = tmp_path / "homie.bin"
    settings = example("training").Settings(steps=2, batch=2, rate=0.01)
    example("train_custom_diffusion").teach(out, None, settings, q_out=q_out)
    pipeline: Any = model.load()
    # diffusers 0.42 drops what it has read if it gets no pipeline.
    pipeline.unet.load_attn_procs(tmp_path, weight_name=out.name, _pipeline=pipeline)
    found = theirs(pipeline, "homie")

    done("generate", "homie", "--custom", out, "-o", tmp_path / "a.png", *QUICK)

    assert np.abs(pixels(tmp_path / "a.png") - found).max() <= 1


def test_the_image_prompt_in_diffusers(tmp_path: Path) -> None:
    out = tmp_path / "image.safetensors"
    train("train_ip_adapter", out)
    picture = torch.randint(256, (1, 64, 64, 3))
    embeds = torch.stack((torch.zeros(1, 192), image_prompt.embeddings(picture)))

    ours, other = model.load(), model.load()
    image_prompt.put_on(ours.unet, 0.7, out)
    pipeline: Any = other
    pipeline.load_ip_adapter(tmp_path, "", out.name, image_encoder_folder=None)
    pipeline.unet.encoder_hid_proj.float()
    pipeline.set_ip_adapter_scale(0.7)

    given = {"ip_adapter_image_embeds": [embeds]}
    assert np.abs(theirs(ours, "cat", **given) - theirs(other, "cat", **given)).max() <= 1


def test_the_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    module = example("train_lora")
    monkeypatch.setattr(module, "PROMPTS", ("rocket",))
    monkeypatch.setattr(example("sheets"), "STEPS", 1)
    train("train_lora", tmp_path / "a.safetensors", sheet=tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height > 300


@pytest.mark.parametrize("name", ["drop_in", "combine"])
def test_other_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example(name).main()
    assert "to the bit" in capsys.readouterr().out


@pytest.mark.slow
def test_all_of_it_compiles_once() -> None:
    pipeline: Any = model.load()
    unet = pipeline.unet
    weight, clock = torch.tensor(0.5), attnproc.on(unet).clock
    attnproc.on(unet).with_lora("style", rank=2).scale("style", weight).with_slicing(3)
    attnproc.on(unet, kind="self").with_pag(3)
    cross = attnproc.on(unet, kind="cross").with_custom_diffusion()
    cross.with_ip_adapter(192, 4, cross.schedule(0.8, end=0.5))
    for name, parameter in unet.named_parameters():
        if ".up." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    torch._dynamo.reset()
    run = torch.compile(unet, backend="eager", fullgraph=True)
    context = (torch.randn(3, 24, 192), [torch.randn(3, 1, 4, 192)])
    noise = torch.randn(3, 12, 32, 32)

    def both(denoise: Any, step: int) -> torch.Tensor:
        with torch.no_grad():
            return denoise(noise, torch.tensor(step), context, return_dict=False)[0]

    torch.testing.assert_close(both(run, 900), both(unet, 900), rtol=0, atol=1e-4)
    for time, amount in ((0.4, 0.1), (0.6, 0.9)):
        clock.set(time)
        weight.fill_(amount)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = both(run, 500)
        torch.testing.assert_close(found, both(unet, 500), rtol=0, atol=1e-4)


def test_the_blocks_of_the_page_run() -> None:
    page = (EXAMPLES.parent / "docs" / "combine.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
