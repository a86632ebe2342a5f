"""The benchmark programs: what a run writes the report reads, and the pages are as the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("tomllib")
pytest.importorskip("typer")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bounds
import denoisers
import floor
import report
import run
import typer
from modes import COMMON, Options, gated
from results import Results
from rows import ROWS
from sides import Disagreement, Pair, pair
from typer.testing import CliRunner
from variants import VARIANTS

BY_NAME = {row.name: row for row in ROWS}


def _run(main: Any, *words: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, words)


def _pair(name: str, shrink: int = 64, device: str = "cpu") -> Pair:
    return pair(BY_NAME[name], device, torch.float32, shrink)


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_pages_are_what_the_results_make_them(page: Path) -> None:
    text = page.read_text()
    assert text == report.filled(text), "run python benchmarks/report.py"


def test_every_section_has_its_place() -> None:
    text = "".join(page.read_text() for page in report.PAGES)
    for name in report.SECTIONS:
        assert text.count(f"<!-- {name}: by benchmarks/report.py -->") == 1
        assert text.count(f"<!-- end of {name} -->") == 1


def test_every_row_has_words_and_arithmetic() -> None:
    import tomllib

    notes = tomllib.loads((report.HERE / "notes.toml").read_text())
    counts = json.loads((report.RESULTS / "bounds.json").read_text())["rows"]
    assert list(notes) == list(counts) == list(BY_NAME)
    assert all(note["bound"] for note in notes.values())


def test_a_run_writes_what_the_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run-cpu-fp32.json"
    words = ["--dtype", "fp32", "--shrink", "64", "--seconds", "0.01", "--out", str(path)]
    words += ["--commit", "abc", "--only", "sd15-s*"]
    assert _run(run.main, *words, "--modes", "eager,peak,floor").exit_code == 0
    first = json.loads(path.read_text())
    assert list(first["rows"]) == ["sd15-self-4096", "sd15-sliced-4096"]

    assert _run(run.main, *words, "--modes", "backward", "--merge").exit_code == 0
    data = json.loads(path.read_text())
    assert [one["commit"] for one in data["runs"]] == ["abc", "abc"]
    row = data["rows"]["sd15-self-4096"]
    assert row["gate"]["gradient_difference"] < 1e-3
    assert {"eager_ms", "eager_min_ms", "peak_mib", "backward_ms"} <= row["ours"].keys()
    assert row["ours"].keys() == row["diffusers"].keys()

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.cpu("fp32")()
    assert "sd15-sliced-4096" in text
    assert "Geometric mean" in text
    # As if it were a GPU's: what is missing is shown as missing.
    path.rename(tmp_path / "run-cuda-bf16.json")
    for section in (report.gpu_summary, report.gpu_rows, report.gpu_backward, report.short):
        assert report.MISSING not in section()


def test_of_several_passes_the_quietest_counts_mode_by_mode(tmp_path: Path) -> None:
    kept = Results(tmp_path / "run.json", "cpu", "abc")
    loud = {"eager_ms": 3.0, "eager_min_ms": 2.0, "graph_ms": 1.0, "peak_mib": 5.0}
    quiet = {"eager_ms": 2.5, "eager_min_ms": 2.4, "graph_ms": 1.1, "peak_mib": 6.0}
    rows = {"ours": dict(loud), "diffusers": dict(loud), "floor": loud | {"ms": 1.0}}
    kept.add("row", {"class": "A"} | rows)
    # Ours took longer this time, but all sides together less.
    again = {"class": "A", "ours": quiet | {"eager_ms": 3.2}, "diffusers": quiet, "floor": quiet}
    kept.add("row", kept.quieter("row", again | {"floor": quiet | {"ms": 0.9}}))
    for side, eager in (("ours", 3.2), ("diffusers", 2.5), ("floor", 2.5)):
        found = kept.rows["row"][side]
        assert (found["eager_ms"], found["eager_min_ms"]) == (eager, 2.4)
        assert (found["graph_ms"], found["peak_mib"]) == (1.0, 5.0)
    assert kept.rows["row"]["floor"]["ms"] == 1.0
    assert kept.quieter("row", {"failed": "no memory"}) == {}
    # Less in sum, but because a side is missing.
    alone = kept.quieter("row", {"ours": {"eager_ms": 3.0, "eager_min_ms": 2.9}})
    assert alone == {"ours": {}}


def test_what_stands_beside_goes_by_turns_with_both_sides() -> None:
    both = _pair("sd15-self-4096")
    with torch.no_grad():
        both.beside["floor"] = floor.calls(both)
    options = Options("cpu", torch.float32, 1, ("eager", "compiled"), 0.01, 60)
    found = gated(lambda: both, [("eager", COMMON["eager"])], options)
    assert found["floor"].keys() == found["ours"].keys() == {"eager_ms", "eager_min_ms"}
    assert found["floor"]["eager_ms"] > 0
    assert not found.get("failures")


def test_a_results_file_of_another_kind_is_not_merged_with(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    words = ["--shrink", "64", "--only", "sd15-self*", "--seconds", "0.01", "--out", str(path)]
    assert _run(run.main, *words, "--dtype", "fp32", "--modes", "peak").exit_code == 0
    again = _run(run.main, *words, "--dtype", "bf16", "--modes", "peak", "--merge")
    assert again.exit_code == 2
    assert "dtype" in again.output


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--only", "none"], "sd15-self-4096"),
        (["--modes", "fast"], "eager"),
        (["--dtype", "int8"], "fp16"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(words: list[str], named: str) -> None:
    found = _run(run.main, *words)
    assert found.exit_code == 2
    assert named in found.output


def test_a_row_that_differs_is_not_timed() -> None:
    both = _pair("sd15-self-4096")
    both.processors["ours"] = lambda *_, **__: torch.zeros_like(both.inputs["hidden_states"])
    with pytest.raises(Disagreement, match="outputs differ"):
        both.agree()


def test_nan_is_a_difference() -> None:
    both = _pair("sd15-self-4096")
    both.processors["ours"] = lambda *_, **__: both.inputs["hidden_states"] * torch.nan
    with pytest.raises(Disagreement, match="nan"):
        both.agree()


def test_the_floor_finds_linear_layers_and_attention() -> None:
    found = floor.record(_pair("flux-double-4096+512"))
    layers = {work: len(names) for work, names in found.names.items()}
    assert layers == {
        floor.Linear(64, 3072, 3072, True): 4,
        floor.Linear(8, 3072, 3072, True): 4,
    }
    assert found.of(floor.Attention) == [floor.Attention(1, 24, 24, 72, 72, 128)]
    assert not found.of(floor.Copy)


@pytest.mark.parametrize("name", ["sd15-eager-4096", "sd15-sliced-4096", "sd15-self-4096"])
def test_the_floor_of_eager_attention_is_that_of_the_fused(name: str) -> None:
    found = floor.record(_pair(name))
    assert found.of(floor.Attention) == [floor.Attention(2, 8, 8, 64, 64, 40)]
    assert sum(found.counts[work] for work in found.of(floor.Linear)) == 4


def test_the_floor_of_linear_attention_has_a_copy() -> None:
    found = floor.record(_pair("sana-linear-pagcfg-4096"))
    # Queries, keys, values of two rows, values of the perturbed one.
    assert found.of(floor.Copy) == [floor.Copy(64 * 2240 * (2 * 3 + 1))]
    found = floor.record(_pair("dcae-multiscale-64x64"))
    assert found.of(floor.Copy) == [floor.Copy(2 * 64 * 512 * 3 * 2)]
    assert len(found.of(floor.Conv)) == 2


def test_the_floor_knows_layers_of_adapters() -> None:
    found = floor.record(_pair("sdxl-ip-cross-4096"))
    names = {name for names in found.names.values() for name in names}
    assert {"to_q.weight", "to_k_ip.0.weight", "to_v_ip.1.weight"} <= names
    keys = {work.keys for work in found.of(floor.Attention) if isinstance(work, floor.Attention)}
    assert keys == {77, 16, 4}


def test_bounds_count_by_hand() -> None:
    found = bounds.bound(BY_NAME["sd15-self-4096"])
    assert found.product_flop == 4 * 2 * 8192 * 320 * 320
    assert found.attention_flop == 4 * 2 * 8 * 4096 * 4096 * 40
    assert found.launches == 6


@pytest.mark.slow
@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_other_shapes_agree(row: Any) -> None:
    with torch.no_grad():
        pair(row, "cpu", torch.float32, 16).agree()


@pytest.mark.slow
@pytest.mark.parametrize("model", denoisers.DENOISERS, ids=lambda model: model.name)
def test_tiny_denoisers_agree(model: denoisers.Denoiser) -> None:
    with torch.no_grad():
        both = denoisers.models(model, "cpu", torch.float32, tiny=True)
        assert both.agree() < 1e-3
    assert both.swapped["swapped"]
