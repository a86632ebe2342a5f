"""Peak memory of a call is at most diffusers', at the widths of real models with fewer tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peak import peak_bytes

import attnproc
from attnproc import widened
from attnproc.verify.references import reference

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from rows import ROWS, Row, make

# Where a call of plain operations holds a little more than diffusers', and why. With the fused
# kernels of a GPU none does (docs/performance.md).
MORE = {
    # The kernel's caller holds q, k, v while linear attention makes wide copies.
    "sana-linear-1024": 1.06,
    "sana-linear-16384": 1.09,
    "sana-linear-pagcfg-4096": 1.04,
    # The text is projected before the image is normed; shrunk, it is a third of the image.
    "sd35-joint-4096+333": 1.06,
}
SMALL = [row for row in ROWS if row.x[1] * row.x[-1] < 2**22 and "sd15" in row.name]


@pytest.fixture(autouse=True)
def _as_on_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a CPU without bfloat16 holds besides is the affair of tests/test_widened.py.
    monkeypatch.setattr(widened, "_lacks", lambda dtype: False)


def _ratio(row: Row) -> float:
    setting = make(row, "cpu", torch.bfloat16, 64 if row.x[1] > 64 else 4)
    theirs = reference(row.cls, row.init)
    ours = getattr(attnproc, row.cls)(**row.init)
    if isinstance(theirs, torch.nn.Module):
        theirs.bfloat16()
        ours.__dict__["_modules"] = dict(theirs.named_children())
    mine, his = (peak_bytes(lambda p=p: p(setting.attn, **setting.inputs)) for p in (ours, theirs))
    return mine / his


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_no_row_holds_more_than_diffusers(row: Row) -> None:
    assert _ratio(row) <= MORE.get(row.name, 1.0)


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_a_few_rows_hold_no_more_than_diffusers(row: Row) -> None:
    assert _ratio(row) <= 1.0
