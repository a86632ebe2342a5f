"""Attention over several processes equals that of one, forward and backward.

The processes of a test run all of its jobs, since starting them takes longer than a job; what
fails is listed by the job's name. One job: `python tests/parallel_jobs.py 2 drop_in-ring`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("typer")

import numpy as np
from cases import some
from parallel_jobs import FAST, JOBS, losing, outcomes
from typer.testing import CliRunner


def _run(ranks: int, names: list[str]) -> None:
    failed = {name: why for name, why in outcomes(ranks, names).items() if why}
    first = next(iter(failed.values()), "")
    assert not failed, f"{len(failed)} of {len(names)}: {', '.join(failed)}\n{first}"


def test_some_classes_on_two_processes() -> None:
    _run(2, FAST[2][::3])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_class_on_several_processes(ranks: int) -> None:
    _run(ranks, FAST[ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_configuration_on_several_processes(ranks: int) -> None:
    _run(ranks, [name for name in JOBS[ranks] if name not in FAST[ranks]])


@some("how", ("hangs", "dies"), fast=2)
def test_a_lost_rank_ends_the_job_on_every_other(how: str) -> None:
    found = losing(how, timeout=2)

    assert sorted(found) == [0, 2]
    for rank, (message, seconds) in found.items():
        assert f"rank {rank}: an exchange with the ranks [0, 1, 2] failed" in message
        assert "within the timeout" in message
        assert seconds < 10


@pytest.mark.slow
def test_torchrun_makes_the_picture_of_one_process(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    app = pytest.importorskip("attnproc.app.commands").app
    words = ("generate", "red heart", "--steps", "2", "--size", "64", "--out")
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    module = ("-m", "attnproc.app")

    alone = CliRunner().invoke(app, [*words, str(tmp_path / "one.png")])
    assert alone.exit_code == 0, alone.output
    command = [sys.executable, *run, *module, *words, str(tmp_path / "two.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    one, two = (np.asarray(image.open(tmp_path / f"{n}.png")).astype(int) for n in ("one", "two"))
    assert abs(one - two).max() <= 1
    (line,) = done.stdout.splitlines()
    assert "on 2 processes" in line
