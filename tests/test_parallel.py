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

import numpy as np
from parallel_jobs import FAST, JOBS, losing, outcomes


def _run(ranks: int, names: list[str]) -> None:
    failed = {name: why for name, why in outcomes(ranks, names).items() if why}
    first = next(iter(failed.values()), "")
    assert not failed, f"{len(failed)} of {len(names)}: {', '.join(failed)}\n{first}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_class_on_several_processes(ranks: int) -> None:
    _run(ranks, FAST[ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_configuration_on_several_processes(ranks: int) -> None:
    _run(ranks, [name for name in JOBS[ranks] if name not in FAST[ranks]])


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_rank_ends_the_job_on_every_other(how: str) -> None:
    found = losing(how, timeout=3)

    assert sorted(found) == [0, 2]
    for rank, (message, seconds) in found.items():
        assert f"rank {rank}: an exchange with the ranks [0, 1, 2] failed" in message
        assert "within the timeout" in message
        assert seconds < 10


def test_torchrun_makes_the_picture_of_one_process(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    words = ("generate", "red heart", "--steps", "2", "--size", "64", "--out")
    module = ("-m", "attnproc.app")
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

    for out, start in (("one.png", ()), ("two.png", run)):
        command = [sys.executable, *start, *module, *words, str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1

    one, two = (np.asarray(image.open(tmp_path / f"{n}.png")).astype(int) for n in ("one", "two"))
    assert abs(one - two).max() <= 1
    assert "on 2 processes" in done.stdout
