"""Explanations, the table of timings, the commands on top of them, and other packages' kernels."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import attnproc
from attnproc.app.commands import app
from attnproc.app.doctor import tried
from attnproc.kernels import (
    AUTO,
    FLEX,
    Kernel,
    Takes,
    ask,
    attention,
    base,
    named,
    register_kernel,
    registered,
    use_table,
)
from attnproc.kernels.base import _REGISTRY
from attnproc.kernels.plan import _by_rule, forget
from attnproc.kernels.timing import calls_of, measure
from attnproc.kernels.tuned import key_of
from attnproc.types import Scoring

EXAMPLE = Path(__file__).parent.parent / "examples" / "new_kernel"


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table that is no user's."""
    path = tmp_path / "kernels.json"
    monkeypatch.setenv("ATTNPROC_TUNED", str(path))
    use_table(None)
    forget()
    yield path
    use_table(None)
    forget()


@pytest.fixture
def without_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel that compiles for a minute before it can be timed."""
    monkeypatch.delitem(_REGISTRY, "flex")


def test_every_kernel_has_a_verdict() -> None:
    q = torch.randn(2, 4, 16, 32)
    found = attnproc.explain(q, mask=attnproc.Causal() & attnproc.Window(3, None))
    assert {v.name for v in found.verdicts} == set(registered()) - {"auto"}
    assert found.chosen == "sdpa"
    assert found["chunked"].runs
    assert "mask window: it takes causal" in found["sage"].reasons
    assert "is not installed: pip install flash-attn" in found["flash"].reasons[0]
    assert "dense mask of 16 x 16" in found["sdpa"].note
    assert str(found).startswith("sdpa runs: the automatic choice, by rules\n+ sdpa")


def test_what_was_named_is_explained() -> None:
    q = torch.randn(2, 4, 16, 32)
    assert attnproc.explain(q, backend="_native_math").chosen == "math"
    with attnproc.backend("math"):
        assert attnproc.explain(q).why == "the block names it"
    refused = attnproc.explain(q, backend="varlen")
    assert (refused.chosen, refused.why) == (
        "none",
        "varlen is asked for and does not take the call",
    )


def test_rules_by_kind_of_call() -> None:
    """Where a GPU would be, by kinds of calls alone."""

    def picked(mask: str, queries: int = 4096, device: str = "cuda", **changes: object) -> str:
        q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
        asked = ask(q, q, q, Scoring())._replace(
            device=device, queries=queries, keys=queries, kinds=frozenset(mask.split()), **changes
        )
        return _by_rule(asked).name

    assert picked("") == picked("causal") == picked("bias") == picked("dense") == "sdpa"
    assert picked("keys") == "sdpa"
    assert picked("keys", 77) == picked("keys", dtype=torch.float32) == "sdpa"
    assert picked("causal keys") == picked("blocks") == "flex"
    assert picked("window") == "varlen"
    assert picked("blocks", dtype=torch.float64) == "chunked"
    assert picked("causal keys", device="cpu") == "chunked"
    assert picked("causal keys", 512, device="cpu") == "sdpa"


@pytest.mark.usefixtures("without_flex")
def test_the_table_rules_the_automatic_choice(own_table: Path) -> None:
    q = torch.randn(1, 2, 24, 16)
    layer = attnproc.Attention(16, heads=2, dim_head=8, processor=attnproc.AttnProcessor2_0())
    x = torch.randn(1, 12, 16)
    found = calls_of(lambda: (layer(x), layer(x), attention(q, q, q)))
    assert sorted(found.values()) == [1, 2]

    with torch.no_grad():
        outcomes = attnproc.autotune(lambda: attention(q, q, q), seconds=0.001)
    (outcome,) = outcomes
    names = {timing.name for timing in outcome.timings}
    assert {"sdpa", "math", "chunked", "reference"} <= names
    written = json.loads(own_table.read_text())
    assert written == {"cpu": {key_of(outcome.asked): outcome.best}}

    own_table.write_text(json.dumps({"cpu": {key_of(outcome.asked): "chunked"}}))
    use_table(own_table)
    forget()
    with torch.no_grad():
        assert attnproc.explain(q).chosen == "chunked"
        torch.testing.assert_close(AUTO(q, q, q, Scoring()), attention(q, q, q, backend="math"))


def write(path: Path, q: torch.Tensor, name: str, **settings: Any) -> None:
    """A table with one entry, in use."""
    with torch.no_grad():
        key = key_of(ask(q, q, q, Scoring(**settings)))
    path.write_text(json.dumps({"cpu": {key: name}}))
    use_table(path)
    forget()


def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() < 5


@pytest.mark.parametrize("settings", [{}, {"window": (3, None)}, {"mods": (near,)}])
@pytest.mark.usefixtures("quantised")
@torch.no_grad()
def test_the_table_rules_compiled_code(settings: dict[str, Any], own_table: Path) -> None:
    q, other, third = (torch.randn(1, 2, n, 16) for n in (24, 25, 26))
    scoring = Scoring(**settings)
    plain = AUTO(other, other, other, scoring)
    write(own_table, q, "coarse", **settings)
    torch._dynamo.reset()
    run = torch.compile(AUTO, backend="eager", fullgraph=True)

    assert torch.equal(run(q, q, q, scoring), q * 1.001)
    # The sizes of this one are symbols.
    torch.testing.assert_close(run(other, other, other, scoring), plain)
    run(third, third, third, scoring)
    # A choice once made is kept.
    use_table(None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(run(q, q, q, scoring), q * 1.001)


@pytest.mark.usefixtures("without_flex")
@torch.no_grad()
def test_windows_and_blocks_are_timed_as_they_are(own_table: Path) -> None:
    q = torch.randn(1, 2, 24, 16)
    masks = (attnproc.Window(3, None), attnproc.Window(5, 5), attnproc.Blocks(near))

    outcomes = attnproc.autotune(lambda: [attention(q, q, q, m) for m in masks], seconds=0.001)

    assert all(timing.error < 1e-4 for o in outcomes for timing in o.timings)
    assert list(json.loads(own_table.read_text())["cpu"]) == [
        "1x2/2 24x24 16/16 window 3,None | float32 window",
        "1x2/2 24x24 16/16 window 5,5 | float32 window",
        "1x2/2 24x24 16/16 | float32 blocks near",
    ]
    with pytest.raises(ValueError, match="give autotune a function that runs it"):
        attnproc.autotune([outcomes[2].asked])


def coarse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    return v * 1.001


@pytest.fixture
def quantised() -> Iterator[Kernel]:
    yield register_kernel(Kernel("coarse", coarse, takes=Takes(exact=False)))
    del _REGISTRY["coarse"]


@pytest.mark.usefixtures("quantised", "without_flex")
def test_quantised_kernels_are_timed_under_a_bound_alone() -> None:
    # With one key the coarse kernel is right but for a thousandth.
    q = torch.randn(4, 8, 1, 64)
    asked = ask(q, q, q, Scoring())
    assert "coarse" not in {t.name for t in measure(asked, seconds=0.001).timings}
    assert measure(asked, max_error=0.01, seconds=0.01).best == "coarse"
    assert measure(asked, max_error=1e-5, seconds=0.001).best != "coarse"


# Commands


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_explain_command() -> None:
    out = run("explain", "--shape", "2,24,4096,64", "--mask", "causal,keys", "--device", "cpu")
    assert "chunked runs this call: the automatic choice" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "--shape", "2,24"), "give four numbers B,H,Q,D"),
        (("explain", "--shape", "1,2,3,4", "--mask", "kyes"), "there are bias, blocks"),
        (("explain", "--shape", "1,2,3,4", "--backend", "mth"), "near it: math"),
        (("autotune",), "give a model"),
        (("autotune", "sd9"), "there are no shapes of 'sd9'"),
        (("autotune", "--shape", "1,2,3,4", "--mask", "window"), "which is not given: --window"),
        (("autotune", "--shape", "1,2,3,4", "--mask", "blocks"), "a function that runs it"),
        (("autotune", "--shape", "1,2,3,4", "--window", "5"), "two numbers LEFT,RIGHT"),
    ],
)
def test_commands_say_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "500"})
    assert result.exit_code == 2
    assert message in result.output


def test_doctor_command() -> None:
    out = run("doctor", "--device", "cpu", "--no-compile")
    assert "it compiles: leave out --no-compile" in out
    assert f"torch {torch.__version__}" in out
    assert "pip install flash-attn" in out


@pytest.mark.usefixtures("without_flex")
def test_doctor_tries_what_compiles_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doctor = import_module("attnproc.app.doctor")
    assert tried(FLEX, "cpu")[0] == "yes"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setitem(_REGISTRY, "flex", FLEX)
    out = run("doctor", "--device", "cpu")
    assert "there is no compiler: install g++ or clang++, or set CXX" in out


def test_doctor_finds_what_is_wrong() -> None:
    works, note = tried(named("chunked"), "cpu")
    assert works == "yes"
    assert note.endswith("with gradients")
    works, note = tried(Kernel("coarse", coarse, takes=Takes(backward=False)), "cpu")
    assert works == "no"
    assert "over 1e-04" in note


@pytest.mark.usefixtures("without_flex")
def test_autotune_command(own_table: Path) -> None:
    shape = ("--shape", "1,2,32,16", "--dtype", "float32", "--device", "cpu", "--seconds", "0.01")
    out = run("autotune", *shape)
    assert str(own_table) in out
    assert "1x2/2 32x32 16/16 | float32 no mask" in own_table.read_text()
    run("autotune", *shape, "--window", "3,5")
    assert "16/16 window 3,5 | float32 window" in own_table.read_text()


# Other packages


def test_kernels_of_other_packages_are_found_by_entry_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    point = EntryPoint("head_by_head", "attnproc_head_by_head:HEAD_BY_HEAD", base.GROUP)
    monkeypatch.setattr(base, "_waiting", {"head_by_head": point})
    q = torch.randn(2, 2, 5, 8)
    try:
        with attnproc.backend("head_by_head"):
            torch.testing.assert_close(attention(q, q, q), attention(q, q, q, backend="math"))
        assert "head_by_head" in registered()
    finally:
        _REGISTRY.pop("head_by_head", None)
        sys.modules.pop("attnproc_head_by_head", None)


def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        runpy.run_path(str(EXAMPLE / "use.py"))
    finally:
        _REGISTRY.pop("head_by_head", None)
    out = capsys.readouterr().out
    assert "in a layer: (2, 16, 32)" in out
    assert "refused: backend 'head_by_head' does not take this call: mask causal" in out
