"""`attnproc edit`, and what steers `attnproc generate`."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import numpy as np
from PIL import Image
from test_cli import QUICK, done, pixels, refused

from attnproc.app.faults import Fault
from attnproc.app.steer import span, weights_of


def test_an_edit_shows_both_pictures_and_the_second_by_itself(tmp_path: Path) -> None:
    out = tmp_path / "edit.png"
    line = done("edit", "red heart", "(blue:1.5) heart", "--out", out, *QUICK)

    assert "'red heart' to 'blue heart'" in line
    with Image.open(out) as sheet:
        assert sheet.width > 2.5 * sheet.height


def test_an_edit_of_no_strength_and_one_to_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[list[np.ndarray]] = []
    module = import_module("attnproc.app.edit")
    inner = module._sheet
    monkeypatch.setattr(
        module,
        "_sheet",
        lambda p, *rest: shown.append(list(map(np.asarray, p))) or inner(p, *rest),
    )
    options = ("--out", tmp_path / "x.png", *QUICK)

    done("edit", "red heart", "blue heart", "--words", 0, "--shapes", 0, *options)
    done("edit", "red heart", "red heart", "--words", 1, "--shapes", 1, *options)
    done("edit", "red heart", "blue heart", *options)

    none, same, edited = shown
    assert np.array_equal(none[1], none[2])
    assert np.abs(same[0].astype(int) - same[1]).max() <= 1
    assert not np.array_equal(edited[1], edited[2])


@pytest.mark.parametrize(
    "options",
    [
        ["(red:2) heart"],
        ["red heart", "--region", "blue heart:0.5,0,1,1"],
        ["red heart", "--reference", "stripes.png"],
        ["red heart", "--reference", "stripes.png", "--region", "blue heart:0,0,0.5,1"],
        ["(red:0) heart", "--schedule", "0,0.5"],
        ["red heart", "--region", "blue heart:0,0,0.5,1", "--schedule", "0,0.5"],
    ],
    ids=["weights", "region", "reference", "both", "schedule", "scheduled region"],
)
def test_what_steers_changes_the_picture(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[::8] = (20, 200, 40)
    Image.fromarray(stripes).save("stripes.png")
    steps = ["--steps", 2, "--size", 64]

    done("generate", "red heart", "--out", "plain.png", *steps)
    done("generate", *options, "--out", "steered.png", *steps)

    assert not np.array_equal(pixels(Path("plain.png")), pixels(Path("steered.png")))


def test_regions_outside_their_schedule_leave_the_prompt(tmp_path: Path) -> None:
    options = ["--steps", 2, "--size", 64, "--region", "blue heart:0,0,0.5,1"]
    paths = [tmp_path / f"{name}.png" for name in ("plain", "never", "late", "always")]

    done("generate", "red heart", "--out", paths[0], *options[:4])
    # The two steps are at 0 and at 0.5.
    done("generate", "red heart", "--out", paths[1], *options, "--schedule", "0.9,1")
    done("generate", "red heart", "--out", paths[2], *options, "--schedule", "0.5,1")
    done("generate", "red heart", "--out", paths[3], *options)

    plain, never, late, always = (pixels(path).astype(int) for path in paths)
    assert np.abs(plain - never).max() <= 1
    assert np.abs(plain - late).max() > 8
    assert np.abs(always - late).max() > 8


def test_with_guidance_maps_and_a_page(tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    picture = tmp_path / "given.png"
    Image.new("RGBA", (30, 30), "teal").save(picture)
    options = ("--reference", picture, "--pag", 2, "--batch", 2, "--maps", "--maps-html")

    line = done("generate", "(red:1.2) heart", *options, "--out", out, *QUICK)

    page = (tmp_path / "x-maps.html").read_text("utf-8")
    assert re.search(r'"words": \["red", "heart"\]', page)
    assert (tmp_path / "x-maps.png").is_file()
    assert (tmp_path / "x-2.png").is_file()
    assert "reference given.png" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["(red:much) heart"], "give a number"),
        (["heart", "--region", "cat:0,0,1"], "give words and a box"),
        (["heart", "--region", "cat:0.5,0,0.2,1"], "give words and a box"),
        (["heart", "--reference", "nowhere.png"], "there is no such file"),
        (["heart", "--schedule", "0.5"], "two fractions"),
        (["heart", "--schedule", "0.6,0.2"], "from 0 to 1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, "generate", *options, "--out", tmp_path / "x.png")


def test_weights_count_the_words_that_are_known() -> None:
    assert weights_of("a (red:1.4) heart") == ("a red heart", ((2, 1.4),))
    assert weights_of("qqqq (red heart:2)") == ("qqqq red heart", ((1, 2.0), (2, 2.0)))
    assert span("0.2,0.6").begin == 0.2
    with pytest.raises(Fault, match="two fractions"):
        span("a,b")
