"""The page holds the maps and works in a browser without anything else."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from test_plots import PICTURE, some_maps  # noqa: E402

from attnproc import html  # noqa: E402

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'application/json">(.*?)</script>', page, re.S)[1])


def test_the_data_are_the_maps() -> None:
    maps = some_maps()
    data = data_of(html.page(PICTURE, maps, "</script> & more"))

    assert data["title"] == "</script> & more"
    assert data["words"] == ["left", "right"]
    assert data["steps"] == ["mean of all", "1 of 3", "2 of 3", "3 of 3"]
    assert [layer["name"] for layer in data["layers"]] == ["mean of all layers", "coarse", "fine"]
    fine = data["layers"][2]
    levels = np.frombuffer(base64.b64decode(fine["maps"]), np.uint8).reshape(4, 2, 4, 4)
    low, high = np.array(fine["ranges"]).T[..., None, None]
    expected = torch.stack([maps.mean("fine"), *(maps.mean("fine", step=i) for i in range(3))])
    assert np.abs(low + levels / 255 * (high - low) - expected[:, 0].numpy()).max() < 0.005


def test_it_loads_nothing_from_elsewhere() -> None:
    page = html.page(PICTURE, some_maps())
    assert not re.search(r'(src|href)\s*=\s*"|@import|https?://', page)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(tmp_path: Path) -> None:
    """Hovering, sliding and choosing redraw the picture; a screenshot shows the left half lit."""
    script = """<script>addEventListener("load", () => setTimeout(() => {
      const canvas = $("picture").getContext("2d");
      const ink = () => Array.from(canvas.getImageData(256, 512, 1, 1).data);
      const found = [ink()];
      document.querySelectorAll("#words button")[1].dispatchEvent(new Event("mouseenter"));
      found.push(ink());
      $("step").value = 2; $("step").dispatchEvent(new Event("input"));
      found.push($("at").textContent);
      $("layer").value = 1; $("layer").dispatchEvent(new Event("change"));
      found.push(state.layer);
      document.querySelectorAll("#words button")[1].dispatchEvent(new Event("mouseleave"));
      $("step").value = 0; $("step").dispatchEvent(new Event("input"));
      const out = document.createElement("pre");
      out.id = "found"; out.textContent = JSON.stringify(found); document.body.append(out);
    }, 200));</script></html>"""
    file, shot = tmp_path / "page.html", tmp_path / "shot.png"
    file.write_text(html.page(PICTURE, some_maps(), "maps").replace("</html>", script), "utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000")
    run = [BROWSER, *options, "--window-size=1100,720"]

    dumped = subprocess.run(
        [*run, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    subprocess.run([*run, f"--screenshot={shot}", file.as_uri()], timeout=120, check=True)

    found = re.search(r'<pre id="found">(.*?)</pre>', dumped.stdout)
    first, second, step, layer = json.loads(found[1])
    assert first != second
    assert (step, layer) == ("2 of 3", 1)
    with Image.open(shot) as picture:
        levels = np.asarray(picture.convert("RGB")).astype(int)
    left, right = levels[330, 150], levels[330, 450]
    assert left[0] - left[2] > right[0] - right[2] + 40
