"""The command line from words to files, and one line for what goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from attnproc import presets
from attnproc.app import cli, faults, files, fitting, wording
from attnproc.app.commands import app
from attnproc.app.demo import metric, reference, vocabulary

QUICK = ("--steps", "2", "--size", "64")


def attnproc(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | Path) -> str:
    """Standard output of a command that must work."""
    result = attnproc(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(folder: Path, *arguments: str | Path) -> str:
    """The one line of a command that must refuse, and leave nothing in `folder`."""
    before = sorted(folder.iterdir())
    result = attnproc(*arguments)
    assert result.exit_code == 2
    assert sorted(folder.iterdir()) == before
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("attnproc: ")
    return line


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_process_writes_the_picture_and_its_maps(tmp_path: Path) -> None:
    out = tmp_path / "heart.png"
    command = [sys.executable, "-m", "attnproc", "generate", "red heart", "--maps", "--out", out]
    # Threads that wait by turning would slow each other down where processors are shared.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}

    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    assert Image.open(out).size == (512, 512)
    sheet = Image.open(tmp_path / "heart-maps.png")
    assert sheet.width > 2 * sheet.height
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heart-maps.png", "heart.png"]
    assert run.stdout.startswith(f"{out} and {tmp_path}/heart-maps.png: 20 steps, guidance 3, ")
    assert "14 x AttnProcessor2_0; " in run.stdout
    assert run.stderr == ""


def test_the_picture_is_what_was_asked_for(tmp_path: Path) -> None:
    known = reference.load()
    places = list(range(0, len(known.asked), len(known.asked) // 3))[:3]
    pictures: list[np.ndarray] = []
    for place in places:
        out = tmp_path / f"{place}.png"
        done("generate", known.labels[known.asked[place]], "-o", out, "--size", "64")
        pictures.append(pixels(out))

    score = metric.measure(np.stack(pictures), places, known)

    assert score.right == len(places)
    assert score.median > 20


def test_seeds_make_the_picture(tmp_path: Path) -> None:
    one, row = tmp_path / "one.png", tmp_path / "row.png"
    done("generate", "red heart", "-o", row, "--seed", "4", "--batch", "2", "--maps", *QUICK)
    done("generate", "red heart", "-o", one, "--seed", "5", *QUICK)

    first, second = (pixels(tmp_path / f"row-{i}.png").astype(int) for i in (1, 2))
    assert np.abs(second - pixels(one)).max() <= 1
    assert np.abs(first - second).max() > 1
    assert (tmp_path / "row-maps.png").is_file()
    assert not row.exists()


@pytest.mark.parametrize("name", ["SlicedAttnProcessor", "fusedattnprocessor2_0", "AttnProcessor"])
def test_a_named_processor_runs_and_agrees(name: str, tmp_path: Path) -> None:
    out = tmp_path / "compare.png"

    line = done("compare", "red heart", "-o", out, "--processor", name, "--steps", "3")

    assert f"14 x {fitting.find(name).__name__}; maximum difference " in line
    assert int(line.partition("maximum difference ")[2].partition("/255")[0]) <= 1
    assert Image.open(out).width > 900


def test_compare_of_the_models_own_processors(tmp_path: Path) -> None:
    line = done("compare", "red heart", "-o", tmp_path / "compare.png")

    assert "maximum difference 0/255" in line or "maximum difference 1/255" in line
    assert "diffusers" in line
    assert "attnproc" in line


def test_without_guidance_the_maps_are_of_all_rows(tmp_path: Path) -> None:
    done("generate", "red heart", "-o", tmp_path / "a.png", "--maps", "--guidance", "1", *QUICK)
    assert (tmp_path / "a-maps.png").is_file()


def test_unknown_words_are_named_and_left_out(tmp_path: Path) -> None:
    result = attnproc("generate", "red hearts zzyzx heart", "-o", tmp_path / "a.png", *QUICK)

    assert result.exit_code == 0
    assert "never seen 'zzyzx'" in result.stderr
    assert (tmp_path / "a.png").is_file()


def test_list_shows_all_with_their_parts() -> None:
    shown = done("list")

    assert shown.startswith("52 processors")
    for name in presets.__all__:
        assert name in shown
    assert "Sliced(1)" in done("list", "SlicedAttnProcessor")
    assert "to_out" in done("list", "AttnProcessor2_0", "--full")


@pytest.mark.parametrize("command", [(), ("generate",), ("compare",), ("list",), ("verify",)])
def test_help(command: Sequence[str]) -> None:
    assert "Usage: " in done(*command, "--help")


def test_version() -> None:
    assert done("--version") == f"attnproc {version('attnproc')}\n"


def test_verify_is_handed_over() -> None:
    assert "0 failed" in done("verify", "--only", "AttnProcessor2_0*", "--no-compile", "--no-low")


BAD = {
    "empty": ([""], "the prompt is empty"),
    "blank": (["  "], "the prompt is empty"),
    "unknown": (["zzyzx octopuss"], r"no word of 'zzyzx octopuss' \(near .*'octopuss': octopus"),
    "no_processor": (["red", "--processor", "Slice"], "near it: SlicedAttnProcessor"),
    "far_processor": (["red", "--processor", "zzyzx"], "see `attnproc list`"),
    "joint": (["red", "--processor", "JointAttnProcessor2_0"], "its projections are 'joint'"),
    "linear": (["red", "--processor", "SanaLinearAttnProcessor2_0"], "its attention is linear"),
    "rotary": (["red", "--processor", "HunyuanAttnProcessor2_0"], "rotates queries and keys"),
    "pag": (["red", "--processor", "PAGIdentitySelfAttnProcessor2_0"], "perturbs a part"),
    "prompt": (["red", "--processor", "IPAdapterAttnProcessor2_0"], "needs an image prompt"),
    "weights": (["red", "--processor", "CustomDiffusionAttnProcessor"], "trained projections"),
    "device": (["red", "--device", "sundial"], "device 'sundial' is none that torch knows"),
    "suffix": (["red", "-o", "{folder}/a.jpg"], r"a name that ends in \.png"),
    "no_folder": (["red", "-o", "{folder}/none/a.png"], "there is no folder"),
    "folder": (["red", "-o", "{folder}"], r"a name that ends in \.png"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_bad_input(command: str, name: str, tmp_path: Path) -> None:
    arguments, message = BAD[name]
    out = [] if "-o" in arguments else ["-o", tmp_path / "a.png"]
    given = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]

    line = refused(tmp_path, command, *given, *out)

    assert re.search(message, line), line


def test_a_processor_whose_kernel_is_missing(tmp_path: Path) -> None:
    if fitting.why_not(presets.XFormersAttnProcessor.recipe) is None:
        pytest.skip("xformers is here")
    line = refused(tmp_path, "generate", "red", "--processor", "XFormersAttnProcessor")
    assert "pip install xformers" in line


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    line = refused(tmp_path, "generate", "red", "-o", tmp_path / "a.png")
    assert "can't be written: No space left on device" in line


def test_a_picture_that_fails_half_way_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"old")

    def half(_self: Image.Image, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(faults.Fault, match="No space left"):
        files.save(Image.new("RGB", (8, 8)), out)

    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model's folder, which the command line uses."""
    folder = tmp_path / "weights"
    shutil.copytree(vocabulary.WEIGHTS, folder)
    monkeypatch.setattr(vocabulary, "WEIGHTS", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text_encoder/model.safetensors", b"damaged", "model.safetensors is damaged (checksum)"),
        ("unet/diffusion_pytorch_model.safetensors", None, "diffusion_pytorch_model.safetensors"),
        ("unet/config.json", b"{", "demo model: "),
        ("SHA256SUMS", None, "SHA256SUMS is missing"),
    ],
)
def test_damaged_or_missing_weights(
    name: str, content: bytes | None, message: str, weights: Path, tmp_path: Path
) -> None:
    (weights / name).unlink() if content is None else (weights / name).write_bytes(content)
    line = refused(tmp_path, "generate", "red heart", "-o", tmp_path / "a.png")
    assert message in line
    assert "reinstall attnproc" in line


@pytest.mark.parametrize(("package", "extra"), faults.EXTRAS.items())
def test_a_missing_package_of_an_extra(package: str, extra: str) -> None:
    fault = faults.missing(ModuleNotFoundError("no", name=f"{package}.inside"))
    assert str(fault) == f"{package} is not installed: pip install 'attnproc[{extra}]'"
    assert faults.missing(ModuleNotFoundError("no", name="unheard_of")) is None


@pytest.mark.parametrize("package", ["diffusers", "PIL"])
def test_a_missing_extra_ends_in_one_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "attnproc.app.pictures", raising=False)
    line = refused(tmp_path, "generate", "red heart", "-o", tmp_path / "a.png", *QUICK)
    assert f"pip install 'attnproc[{faults.EXTRAS[package]}]'" in line


def test_without_typer_the_install_line_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "attnproc.app.commands")

    with pytest.raises(SystemExit) as stopped:
        cli.main()

    assert stopped.value.code == 2
    assert "pip install 'attnproc[cli]'" in capsys.readouterr().err


def test_words_that_come_twice_are_numbered() -> None:
    read = wording.read("red heart and red star")
    assert list(read.positions) == ["red", "heart", "and", "red (2)", "star"]
    assert list(read.positions.values()) == [1, 2, 3, 4, 5]


def test_long_prompts_are_cut_and_it_is_said() -> None:
    read = wording.read("red " * 30)
    assert "the prompt is cut after 22 words, before 'red'" in read.notes
