"""Tables in the forms that callers send."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FIRST
from torch import Tensor

from attnproc.rotary import complex_pairs, table_of
from attnproc.verify.build import Result, build, evaluate


def test_a_real_table_of_complex_pairs_is_complex_without_imaginary_part() -> None:
    x, table = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 4)
    whole = torch.complex(table, torch.zeros_like(table))

    torch.testing.assert_close(complex_pairs(x, table), complex_pairs(x, whole), rtol=0, atol=0)
    for mine, other in zip(
        table_of(complex_pairs, table) or (), table_of(complex_pairs, whole) or (), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_lumina_takes_a_real_table_as_diffusers_does() -> None:
    pytest.importorskip("diffusers")
    found, right = (_lumina(side) for side in ("ours", "theirs"))

    # diffusers turns in float32.
    torch.testing.assert_close(found.outputs, right.outputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(dict(found.grads), dict(right.grads), rtol=0, atol=1e-4)


def _lumina(side: Any) -> Result:
    setting = build(FIRST["LuminaAttnProcessor2_0"], side, torch.float64)
    x: Tensor = setting.inputs["hidden_states"]
    width = setting.attn.to_q.out_features // setting.attn.heads
    table = torch.linspace(-2, 2, x.shape[1] * width // 2, dtype=torch.float64)
    table = table.view(1, x.shape[1], width // 2)
    setting.inputs |= {"query_rotary_emb": table, "key_rotary_emb": table}
    return evaluate(setting, setting.call())
