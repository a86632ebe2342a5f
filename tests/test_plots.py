"""Pictures of maps: sizes, what is bright where, and animations with a frame a step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from attnproc import plots  # noqa: E402
from attnproc.capture import Maps  # noqa: E402


def some_maps(steps: int = 3) -> Maps:
    """Two words in two layers: the first looks to the left, the second to the right."""
    maps = Maps({"left": 0, "right": 1}, each_step=True)
    for step in range(steps):
        for layer, side in (("coarse", 2), ("fine", 4)):
            plane = torch.zeros(1, side, side, 2)
            plane[:, :, : side // 2, 0] = plane[:, :, side // 2 :, 1] = 0.1 + step
            maps.add(layer, plane.flatten(1, 2))
    return maps


PICTURE = Image.new("RGB", (64, 64), "white")


def test_an_overlay_is_bright_where_the_map_is() -> None:
    weight = torch.zeros(4, 4)
    weight[:, :2] = 1

    levels = np.asarray(plots.overlay(PICTURE, weight, size=80)).astype(int)

    # Bright yellow on the left; on the right the picture, darkened a little.
    assert levels.shape == (80, 80, 3)
    assert levels[40, 10, 0] > levels[40, 10, 2] + 40
    assert np.ptp(levels[40, 70]) < 10


def test_a_map_that_is_the_same_everywhere_makes_no_division_by_zero() -> None:
    assert plots.overlay(PICTURE, torch.full((4, 4), 0.5)).size == (256, 256)


def test_sheets() -> None:
    maps = some_maps()
    sheet, layers = plots.sheet([PICTURE], maps, "a title"), plots.layers(PICTURE, maps)

    assert sheet.width > 2 * sheet.height
    assert layers.width > 300
    assert layers.height > 300


@pytest.mark.parametrize("ending", [".gif", ".png"])
def test_an_animation_has_a_frame_a_step(ending: str, tmp_path: Path) -> None:
    plots.animation(PICTURE, some_maps(), tmp_path / f"steps{ending}")

    with Image.open(tmp_path / f"steps{ending}") as found:
        assert found.n_frames == 3
        assert found.info["duration"] == 150


def test_what_can_not_be_animated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each_step=True"):
        plots.animation(PICTURE, Maps({"a": 1}), tmp_path / "steps.gif")
    with pytest.raises(ValueError, match="ends in"):
        plots.animation(PICTURE, some_maps(), tmp_path / "steps.mp4")


def test_components_part_things_by_colour() -> None:
    places = torch.zeros(3, 4, 4)
    places[0, :, :2] = 1

    levels = np.asarray(plots.components(places, 8))

    assert levels.shape == (8, 8, 3)
    assert (levels[0, 0] == (255, 0, 0)).all()
    assert (levels[0, 7] == 0).all()


def test_what_users_look_for_is_there_after_the_import() -> None:
    code = (
        "import sys, attnproc\n"
        "assert not {'matplotlib', 'PIL', 'attnproc.plots'} & set(sys.modules)\n"
        "for name in ('plots.sheet', 'html.save', 'steering.Regional', 'capture', 'components',\n"
        "             'Box', 'Region', 'align', 'parse', 'Maps.load'):\n"
        "    thing = attnproc\n"
        "    for part in name.split('.'):\n"
        "        thing = getattr(thing, part)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert not hasattr(attnproc, 'nothing')\n"
        "from attnproc.capture import load, key_weights\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
