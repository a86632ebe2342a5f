"""What the processes of test_parallel.py run; each job raises where it finds a difference.

All jobs of a number of processes run one after another in one set of processes, since starting
one takes seconds.
"""

from __future__ import annotations

import datetime
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, FIRST, Case
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import attnproc
from attnproc.parallel.config import spread_over
from attnproc.parallel.exchange import shares, spans
from attnproc.verify.build import Result, Setting, build, evaluate
from attnproc.verify.build import _leaves as leaves_of
from attnproc.verify.check import quiet
from attnproc.verify.fakes import installed
from attnproc.verify.specs import Axes, Mask, Turns, draw

__all__ = ["JOBS", "Job", "outcomes", "started"]

Job = Callable[[], None]
Shape = tuple[tuple[str, int], ...]

TOKENS: Shape = (("ulysses", 2),)
RING: Shape = (("ring", 2),)
FOUR: Shape = (("ulysses", 4),)
BOTH: Shape = (("ring", 2), ("ulysses", 2))
ROWS: Shape = (("batch", 2),)
ALL: Shape = (("batch", 2), ("ulysses", 2))

# Dropout draws other numbers on every rank.
PLAIN = [case for case in CASES if "dropout" not in case.tags and "dropout" not in case.id]
_SAME: dict[str, Result] = {}
_MESHES: dict[Shape, Any] = {}


def started(rank: int, ranks: int, folder: str, timeout: float = 60) -> None:
    """Joins the processes of a folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )


def outcomes(ranks: int, names: Iterable[str]) -> dict[str, str]:
    """What went wrong on any of so many processes, by job; nothing where all went well."""
    names = list(names)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (ranks, folder, names), ranks)
        found = [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(ranks)]
    return {name: "\n".join(filter(None, (of[name] for of in found))) for name in names}


def _run(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    started(rank, ranks, folder, timeout=20)
    found: dict[str, str] = {}
    with installed(), quiet():
        for name in names:
            try:
                JOBS[ranks][name]()
                found[name] = ""
            except Exception:
                found[name] = f"rank {rank}: {traceback.format_exc()}"
            # After an error on one rank alone the others would wait for it in the next job.
            try:
                dist.barrier()
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {found[name]}") from error
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def mesh_of(shape: Shape) -> Any:
    """The mesh of some axes, made once."""
    if shape not in _MESHES:
        names, sizes = zip(*shape, strict=True)
        _MESHES[shape] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    return _MESHES[shape]


def alone(case: Case) -> Result:
    """What one process makes of a case."""
    if case.id not in _SAME:
        setting = build(case, "ours", torch.float64)
        _SAME[case.id] = evaluate(setting, setting.call(direct=False), case.grads)
    return _SAME[case.id]


def inside(case: Case, shape: Shape) -> None:
    """A module that gets all tokens, and all rows."""
    setting = build(case, "ours", torch.float64)
    attnproc.parallelize(setting.attn, mesh_of(shape))
    got = evaluate(setting, setting.call(direct=False), case.grads)
    grads = {name: _mean(grad) for name, grad in got.grads.items()}
    same(Result(got.outputs, grads), alone(case))
    attnproc.unparallelize(setting.attn)
    same(evaluate(setting, setting.call(direct=False), case.grads), alone(case))


def outside(case: Case, shape: Shape, text: Any) -> None:
    """A module that gets its own tokens, as by a plan of diffusers."""
    setting = build(case, "ours", torch.float64)
    spread = spread_over(mesh_of(shape), text, inside=False, uneven=True)
    setting.processor._parallel_config = spread
    axis = spread.tokens
    x = setting.inputs["hidden_states"]
    lengths = shares(x.shape[1], axis.size)
    at = spans(lengths)[axis.rank]
    context = setting.inputs.get("encoder_hidden_states")
    joint = len(alone(case).outputs) > 1
    of_text = slice(0, 0)
    if joint and isinstance(context, Tensor):
        total = context.shape[1]
        of_text = (
            spans(shares(total, axis.size))[axis.rank] if text == "split" else slice(0, total)
        )
    given = dict(setting.inputs)
    given["hidden_states"] = x[:, at]
    if context is x:
        given["encoder_hidden_states"] = given["hidden_states"]
    elif joint and isinstance(context, Tensor):
        given["encoder_hidden_states"] = context[:, of_text]
    for name, spec in case.inputs.items():
        if "rot" in name:
            given[name] = _own_table(given[name], spec, at, of_text, context)
    call = Setting(case, setting.attn, setting.processor, given)
    outputs = call.call(direct=False)

    want = alone(case)
    cuts = (at, of_text, at)
    losses = []
    for i, out in enumerate(outputs):
        full = want.outputs[i]
        close(out, full[:, cuts[i]], f"output {i}")
        weight = draw(case.id, f"loss.{i}", tuple(full.shape))[:, cuts[i]]
        share = axis.size if i == 1 and text == "replicated" else 1
        losses.append((out.double() * weight).sum() / share)
    if not case.grads:
        return
    leaves = leaves_of(setting)
    grads = torch.autograd.grad(sum(losses), list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        total = torch.zeros_like(leaf) if grad is None else grad.clone()
        dist.all_reduce(total)
        close(total, want.grads[name], name)


def _own_table(table: Any, spec: Any, at: slice, of_text: slice, context: Any) -> Any:
    if table is None:
        return None
    if isinstance(spec, Axes):
        angles, positions = table
        return angles, tuple(position[:, at] for position in positions)
    if isinstance(spec, Turns) and not spec.heads:
        return table[:, at] if table.shape[1] >= at.stop else table
    if len(spec.over) > 1 and context is not None:
        total = context.shape[1]
        parts = [(part[of_text], part[total:][at]) for part in table]
        return tuple(torch.cat(part) for part in parts)
    return tuple(part[at] for part in table)


def same(got: Result, want: Result) -> None:
    """Outputs and gradients are equal."""
    for i, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True)):
        close(a, b, f"output {i}")
    for name, grad in got.grads.items():
        close(grad, want.grads[name], name)


def close(got: Tensor, want: Tensor, name: str) -> None:
    """Equal to what float32 tables of positions leave of float64."""
    assert got.shape == want.shape, f"{name}: {list(got.shape)}, not {list(want.shape)}"
    error = (got - want).abs().max().item() if want.numel() else 0.0
    allowed = 1e-6 * max(1.0, want.abs().max().item() if want.numel() else 0.0)
    assert error <= allowed, f"{name} is off by {error:.2e}"


def _mean(t: Tensor) -> Tensor:
    t = t.clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()


def _can_split(case: Case) -> bool:
    x = case.inputs["hidden_states"]
    if len(x.shape) != 3 or case.id.startswith(("MochiVae", "SanaMultiscale")):
        return False
    # A group norm inside the module is over all tokens.
    return not any(part in case.id for part in ("-flat", "AddedKV", "group_norm"))


def _has_rows(case: Case) -> bool:
    """Whether rows of the batch can be told by the first axis of the inputs."""
    mask, batch = case.inputs.get("attention_mask"), case.inputs["hidden_states"].shape[0]
    stacked = isinstance(mask, Mask) and mask.form == "bias_heads"
    partial_rows = isinstance(mask, Mask) and mask.batch not in (0, batch)
    tables = case.cls.startswith("Allegro") and "rope" in case.id
    return not (stacked or partial_rows or tables or case.id.endswith("large-train"))


def jobs_of(cases: Iterable[Case]) -> dict[int, dict[str, Job]]:
    """The jobs of some configurations, by the number of processes."""
    two: dict[str, Job] = {}
    four: dict[str, Job] = {}
    for case in cases:
        two[f"tokens-{case.id}"] = partial(inside, case, TOKENS)
        if _has_rows(case):
            two[f"rows-{case.id}"] = partial(inside, case, ROWS)
        four[f"both-{case.id}"] = partial(inside, case, BOTH)
        if _can_split(case):
            two[f"ring-{case.id}"] = partial(outside, case, RING, "split")
            two[f"split-{case.id}"] = partial(outside, case, TOKENS, "split")
            two[f"replicated-{case.id}"] = partial(outside, case, TOKENS, "replicated")
            four[f"four-{case.id}"] = partial(outside, case, FOUR, "split")
    return {2: two, 4: four}


JOBS: dict[int, dict[str, Job]] = jobs_of(PLAIN)
FAST = {
    ranks: [name for name in jobs if name.partition("-")[2] in {c.id for c in FIRST.values()}]
    for ranks, jobs in JOBS.items()
}
