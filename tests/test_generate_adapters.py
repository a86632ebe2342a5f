"""What `attnproc generate` puts on the demo model: it works, combines, agrees with diffusers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import QUICK, done, pixels, refused

import attnproc
from attnproc.app import adapters, guided, image_prompt
from attnproc.app.demo import model
from attnproc.weights import save_custom_diffusion, save_lora

WORDS = "red heart"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files for the demo model, of random weights that change a picture; and a picture."""
    path = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    pipeline: Any = model.load()
    on = attnproc.on(pipeline.unet)
    on.with_lora("style", rank=2)
    for name, weight in pipeline.unet.named_parameters():
        if ".up." in name:
            torch.nn.init.normal_(weight, std=0.05)
    save_lora(pipeline.unet, path / "style.safetensors", "style")
    save_lora(pipeline.unet, path / "kohya.safetensors", "style", "kohya")
    attnproc.on(pipeline.unet, kind="cross").with_custom_diffusion()
    save_custom_diffusion(pipeline.unet, path / "custom.safetensors")
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[::8] = (20, 200, 40)
    Image.fromarray(stripes).save(path / "stripes.png")
    return path


def options(folder: Path, *names: str) -> list[str]:
    given = {
        "lora": ["--lora", f"{folder / 'style.safetensors'}:0.5"],
        "custom": ["--custom", str(folder / "custom.safetensors")],
        "image": ["--image", f"{folder / 'stripes.png'}:0.6"],
        "pag": ["--pag", "2"],
    }
    return [option for name in names for option in given[name]]


def made(out: Path, *given: str) -> np.ndarray:
    done("generate", WORDS, "-o", out, *QUICK, *given)
    return pixels(out).astype(int)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return made(tmp_path_factory.mktemp("plain") / "a.png")


@pytest.mark.parametrize("name", ["lora", "custom", "image", "pag"])
def test_each_changes_the_picture(
    name: str, folder: Path, plain: np.ndarray, tmp_path: Path
) -> None:
    assert np.abs(made(tmp_path / "a.png", *options(folder, name)) - plain).max() > 8


@pytest.mark.parametrize("channel", range(3))
def test_a_picture_brings_its_colours(channel: int, tmp_path: Path) -> None:
    given, out = tmp_path / "given.png", tmp_path / "a.png"
    colour = [30, 30, 30]
    colour[channel] = 220
    Image.new("RGB", (16, 16), tuple(colour)).save(given)

    done("generate", "cat", "-o", out, "--image", given, "--steps", "8", "--size", "64")

    assert pixels(out).mean((0, 1)).argmax() == channel


def test_the_character_that_ships(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "examples" / "weights" / "homie.safetensors"
    sheet = ["--steps", "12", "--size", "64"]
    done("generate", "homie", "-o", tmp_path / "a.png", "--custom", file, *sheet)
    # Its teal body, where the word was a yellow face.
    red, _, blue = pixels(tmp_path / "a.png")[36:54, 16:48].reshape(-1, 3).mean(0)
    assert blue > red + 30


def test_weights_of_zero_change_nothing(folder: Path, plain: np.ndarray, tmp_path: Path) -> None:
    off = ["--lora", f"{folder / 'style.safetensors'}:0", "--pag", "0"]
    off += ["--image", f"{folder / 'stripes.png'}:0"]
    assert np.array_equal(made(tmp_path / "a.png", *off), plain)


def test_two_halves_are_a_whole_in_any_layout(folder: Path, tmp_path: Path) -> None:
    style, kohya = folder / "style.safetensors", folder / "kohya.safetensors"
    whole = made(tmp_path / "a.png", "--lora", str(style))
    halves = made(tmp_path / "b.png", "--lora", f"{style}:0.5", "--lora", f"{kohya}:0.5")
    assert np.abs(whole - halves).max() <= 1


@pytest.mark.slow
def test_all_together_on_other_processors(folder: Path, tmp_path: Path) -> None:
    every = options(folder, "lora", "custom", "image", "pag")
    first = made(tmp_path / "a.png", *every)
    for name in ("SlicedAttnProcessor", "FusedAttnProcessor2_0"):
        other = made(tmp_path / "b.png", *every, "--processor", name)
        assert np.abs(first - other).max() <= 1


def test_all_together_with_maps_of_several_pictures(folder: Path, tmp_path: Path) -> None:
    every = options(folder, "lora", "custom", "image", "pag")
    line = done("generate", WORDS, "-o", tmp_path / "a.png", *QUICK, *every, "--maps", "--batch=2")
    assert "with LoRA style.safetensors (0.5), Custom Diffusion custom.safetensors, " in line
    assert "picture stripes.png (0.6), perturbed guidance 2; " in line
    assert {p.name for p in tmp_path.iterdir()} == {"a-1.png", "a-2.png", "a-maps.png"}


def test_without_guidance_by_words(folder: Path, tmp_path: Path) -> None:
    given = [*options(folder, "image", "pag"), "--guidance", "1", "--maps"]
    made(tmp_path / "a.png", *given)
    assert (tmp_path / "a-maps.png").is_file()


def theirs(change: Any, **inputs: Any) -> np.ndarray:
    """The picture by diffusers alone, after `change` of its pipeline."""
    pipeline: Any = model.load()
    pipeline = change(pipeline) or pipeline
    seed = [torch.Generator().manual_seed(0)]
    result = pipeline([WORDS], num_inference_steps=2, guidance_scale=3.0, generator=seed, **inputs)
    return np.asarray(result.images[0]).astype(int)


def test_a_lora_as_diffusers_has_it(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = folder / "style.safetensors"
    found = theirs(lambda pipeline: pipeline.load_lora_weights(path))
    assert np.abs(made(tmp_path / "a.png", "--lora", str(path)) - found).max() <= 1


def test_an_image_prompt_as_diffusers_has_it(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(image_prompt.FILE)
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        nested[part][name] = tensor.float()
    picture = torch.from_numpy(np.asarray(Image.open(folder / "stripes.png")).copy())
    embeds = image_prompt.embeddings(picture[None])
    rows = torch.stack((torch.zeros_like(embeds), embeds))

    def load(pipeline: Any) -> None:
        pipeline.unet._load_ip_adapter_weights([nested])
        pipeline.set_ip_adapter_scale(0.6)

    found = theirs(load, ip_adapter_image_embeds=[rows])
    assert np.abs(made(tmp_path / "a.png", *options(folder, "image")) - found).max() <= 1


def test_perturbed_guidance_as_diffusers_has_it(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPAGPipeline

    def change(pipeline: Any) -> Any:
        return StableDiffusionPAGPipeline(
            **pipeline.components, requires_safety_checker=False, pag_applied_layers=PAG_LAYERS
        )

    found = theirs(change, pag_scale=2.0)
    assert np.abs(made(tmp_path / "a.png", "--pag", "2") - found).max() <= 1


PAG_LAYERS = guided.LAYERS.replace("*", "")


def test_perturbation_is_off_after_the_call(folder: Path) -> None:
    pipeline: Any = model.load()
    attnproc.swap(pipeline.unet)
    before = pipeline.unet.attn_processors
    given = adapters.read([], None, None, 2.0)

    run: Any = given.put_on(pipeline)
    run([WORDS], num_inference_steps=1, **given.inputs(3.0))

    after = pipeline.unet.attn_processors
    assert all(after[path] is before[path] for path in before)


BAD = {
    "no_lora": (["--lora", "{folder}/none.safetensors"], "--lora .*there is no such file"),
    "no_custom": (["--custom", "{folder}/none.bin"], "--custom .*there is no such file"),
    "no_image": (["--image", "{folder}/none.png:0.5"], r"--image .*none\.png: there is no such"),
    "no_number": (["--lora", "{folder}/style.safetensors:much"], "much: there is no such file"),
    "nan": (["--lora", "{folder}/style.safetensors:nan"], "give a finite number"),
    "not_a_picture": (["--image", "{folder}/style.safetensors"], "can't be read as a picture"),
    "a_folder": (["--image", "{folder}"], "can't be read as a picture"),
    "not_a_file": (
        ["--lora", "{folder}/broken.safetensors"],
        "broken.safetensors: it can't be read",
    ),
    "not_a_pickle": (
        ["--custom", "{folder}/broken.bin"],
        "broken.bin: it can't be read",
    ),
    "other_layout": (["--lora", "{folder}/custom.safetensors"], "LoRA does not fit.* and [0-9]+"),
    "other_kind": (["--custom", "{folder}/style.safetensors"], "Custom Diffusion does not fit"),
    "unknown": (["--lora", "{folder}/more.safetensors"], "unet.nowhere.lora_A.weight: is unknown"),
    "shapes": (
        ["--custom", "{folder}/shapes.safetensors"],
        r"shape \(1, 192\), need \(128, 192\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, folder: Path, tmp_path: Path) -> None:
    given, message = BAD[name]
    inside = tmp_path / "given"
    shutil.copytree(folder, inside)
    _spoil(inside)
    arguments = [argument.replace("{folder}", str(inside)) for argument in given]

    line = refused(tmp_path, "generate", WORDS, "-o", tmp_path / "a.png", *QUICK, *arguments)

    assert re.search(message, line), line


def _spoil(folder: Path) -> None:
    (folder / "broken.safetensors").write_bytes(b"broken")
    (folder / "broken.bin").write_bytes(b"broken")
    style = load_file(folder / "style.safetensors")
    save_file({**style, "unet.nowhere.lora_A.weight": torch.ones(1)}, folder / "more.safetensors")
    custom = load_file(folder / "custom.safetensors")
    cut = {k: v[:1].clone() if "to_k" in k else v for k, v in custom.items()}
    save_file(cut, folder / "shapes.safetensors")
