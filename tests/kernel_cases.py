"""Cases of attention for every kernel, drawn by hypothesis or at random, and their check.

Also used on a GPU by `benchmarks/kernels_gpu.py`, where hypothesis may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnproc.kernels import Kernel, Refused, ask, attention, why_not
from attnproc.kernels.functional import scoring_of
from attnproc.kernels.oracle import oracle
from attnproc.types import All, Bias, Blocks, Causal, Keys, MaskKind, Window

Draw = Callable[[Sequence[Any]], Any]

KINDS = ("keys", "lengths", "dense", "bias", "learned", "causal", "window", "blocks")
HALF = (torch.float16, torch.bfloat16)
ALL_DTYPES = (torch.float32, torch.float64, *HALF)


@dataclass(frozen=True)
class Checkers:
    """Blocks of positions that see each other, shifted by head."""

    size: int

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((i // self.size + j // self.size + h) % 2 == 0) | (j == b)


@dataclass
class Case:
    """One call; `seed` decides what the tensors hold."""

    seed: int
    dtype: torch.dtype
    batch: int
    kv_heads: int
    groups: int
    queries: int
    keys: int
    dim: int
    v_dim: int
    scale: float | str | None
    kinds: tuple[str, ...]
    grads: bool
    device: str = "cpu"

    def __post_init__(self) -> None:
        gen = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.groups
        self.random = lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64)
        shapes = (
            (self.batch, heads, self.queries, self.dim),
            (self.batch, self.kv_heads, self.keys, self.dim),
            (self.batch, self.kv_heads, self.keys, self.v_dim),
        )
        self.inputs = [self._leaf(self.random(*shape)) for shape in shapes]
        self.bias: Tensor | None = None
        parts = tuple(self._mask(kind, heads) for kind in self.kinds)
        self.mask: MaskKind | None = All(parts) if parts else None
        number = torch.tensor(0.3, device=self.device)
        self.factor = number if self.scale == "tensor" else self.scale
        self.upstream = self.random(self.batch, heads, self.queries, self.v_dim).to(self.device)

    def _leaf(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype).requires_grad_(self.grads)

    def _mask(self, kind: str, heads: int) -> MaskKind:
        some = {
            "keys": lambda: Keys((self.random(self.batch, self.keys) > -0.5).to(self.device)),
            "lengths": lambda: Keys.first(self._lengths(), self.keys),
            "dense": lambda: Bias(
                (self.random(self.batch, 1, self.queries, self.keys) > 0).to(self.device)
            ),
            "causal": Causal,
            "window": lambda: Window(self.seed % 7, None if self.seed % 2 else self.seed % 3),
            "blocks": lambda: Blocks(Checkers(1 + self.seed % 9)),
        }
        if kind in some:
            return some[kind]()
        values = self.random(1, heads, self.queries if self.seed % 2 else 1, self.keys)
        values = values.masked_fill(values > 1, -math.inf).to(self.device, self.dtype)
        if kind == "learned" and self.grads and self.bias is None:
            self.bias = values.requires_grad_()
        return Bias(values)

    def _lengths(self) -> Tensor:
        return (self.random(self.batch).abs() * self.keys / 2).long().to(self.device)

    @property
    def leaves(self) -> list[Tensor]:
        return self.inputs if self.bias is None else [*self.inputs, self.bias]


def draw_case(
    draw: Draw,
    dtypes: Sequence[torch.dtype],
    device: str = "cpu",
    size: int = 40,
    dims: Sequence[int] = (8, 16, 40, 64, 5, 128),
    grads: Sequence[bool] = (True, False),
) -> Case:
    """A case; `draw` picks one of a sequence."""
    lengths = range(1, size + 1)
    queries = draw(lengths)
    dim = draw(dims)
    kinds = tuple(kind for kind in KINDS if draw((False, False, True)))
    return Case(
        seed=draw(range(1 << 16)),
        dtype=draw(dtypes),
        batch=draw((1, 2, 3)),
        kv_heads=draw((1, 2)),
        groups=draw((1, 1, 2, 3)),
        queries=queries,
        keys=draw((queries, draw(lengths))),
        dim=dim,
        v_dim=draw((dim, dim, 16)),
        scale=draw((None, 0.05, 0.4, "tensor")),
        kinds=kinds if "lengths" not in kinds or "keys" not in kinds else kinds[1:],
        grads=draw(grads),
        device=device,
    )


def check(case: Case, kernel: Kernel, run: Callable[..., Any] = attention) -> str:
    """Holds a kernel against the oracle if it takes the case, else expects its refusal.

    Returns:
        "equal" or "refused".
    """
    q, k, v = case.inputs
    takes_lse = kernel.takes.lse
    scoring = scoring_of(q, k, case.mask, scale=case.factor)
    if why_not(kernel.takes, ask(q, k, v, scoring, lse=True)) and takes_lse:
        takes_lse = False
    reasons = why_not(kernel.takes, ask(q, k, v, scoring, takes_lse))
    options = {"scale": case.factor, "backend": kernel.name, "return_lse": takes_lse}
    if reasons:
        assert all(reasons)
        with suppress(Refused, ImportError):
            run(q, k, v, case.mask, **options)
            raise AssertionError(f"{kernel.name} refuses ({reasons}) and runs")
        return "refused"

    got = run(q, k, v, case.mask, **options)
    o, lse = got if takes_lse else (got, None)
    right, right_lse = oracle(q, k, v, case.mask, scale=case.factor)
    assert o.dtype == q.dtype, o.dtype
    assert o.shape == right.shape, o.shape
    _close("output", o, right, case, kernel)
    if lse is not None:
        _close("lse", lse, right_lse, case, kernel)
    if case.grads:
        grads = torch.autograd.grad(o, case.leaves, case.upstream.to(o.dtype), allow_unused=True)
        wanted = torch.autograd.grad(right, case.leaves, case.upstream, allow_unused=True)
        for name, a, b, leaf in zip("qkvb", grads, wanted, case.leaves, strict=False):
            a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
            _close(f"gradient of {name}", a, b, case, kernel)
    return "equal"


_EPS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _close(what: str, got: Tensor, want: Tensor, case: Case, kernel: Kernel) -> None:
    got, want = got.detach().double(), want.detach().double()
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{kernel.name}: {what}: finite elsewhere"
    assert torch.equal(got[~finite], want[~finite]), f"{what}: {got[~finite]}"
    # Eager attention keeps its scores in the dtype of the inputs.
    allowed = _EPS[case.dtype] * (4 if kernel.name in ("reference", "math") else 1)
    error = ((got - want).abs()[finite] / (1 + want.abs()[finite])).max() if finite.any() else 0
    assert error <= allowed, f"{kernel.name}: {what}: error {error:.2e} is over {allowed:.0e}"
