"""What the processes of test_parallel.py run; each job raises where it finds a difference.

All jobs of a number of processes run one after another in one set of processes, since starting
one takes seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import CASES, FIRST, Case
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import attnproc
from attnproc.parallel import copies
from attnproc.parallel.check import Disagree
from attnproc.parallel.config import spread_over
from attnproc.parallel.exchange import Axis, Lost, post, shares, spans
from attnproc.verify.build import Result, Setting, build, evaluate
from attnproc.verify.build import _leaves as leaves_of
from attnproc.verify.check import quiet
from attnproc.verify.fakes import installed
from attnproc.verify.specs import Axes, Mask, Turns, draw

__all__ = ["FAST", "JOBS", "losing", "outcomes"]

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
    os.environ["ATTNPROC_TEST_FOLDER"] = folder
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
        # On four processes one way or the other, which takes half the time.
        if _can_split(case) and len(four) % 2:
            four[f"four-{case.id}"] = partial(outside, case, FOUR, "split")
        else:
            four[f"both-{case.id}"] = partial(inside, case, BOTH)
        if not _can_split(case):
            continue
        context = case.inputs.get("encoder_hidden_states") is not None
        if not context:
            two[f"ring-{case.id}"] = partial(outside, case, RING, "split")
        two[f"split-{case.id}"] = partial(outside, case, TOKENS, "split")
        if context:
            two[f"replicated-{case.id}"] = partial(outside, case, TOKENS, "replicated")
    return {2: two, 4: four}


def losing(how: str, timeout: float) -> dict[int, tuple[str, float]]:
    """What the other ranks of three say when one dies or hangs, and after how many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = torch.multiprocessing.get_context("spawn")
        processes = [
            spawn.Process(target=_lose, args=(rank, folder, how, timeout)) for rank in range(3)
        ]
        for process in processes:
            process.start()
        for rank in (0, 2):
            processes[rank].join()
        processes[1].kill()
        processes[1].join()
        files = {rank: Path(folder, str(rank)) for rank in range(3)}
        return {rank: pickle.loads(f.read_bytes()) for rank, f in files.items() if f.exists()}


def _lose(rank: int, folder: str, how: str, timeout: float) -> None:
    started(rank, 3, folder, timeout)
    attn = attnproc.Attention(query_dim=16, processor=attnproc.AttnProcessor2_0())
    attnproc.parallelize(attn, init_device_mesh("cpu", (3,)))
    x = torch.zeros(1, 9, 16)
    attn(x)
    if rank == 1 and how == "dies":
        os._exit(1)
    if rank == 1:
        time.sleep(600)
    begin = time.monotonic()
    try:
        for _ in range(2):
            attn(x)
    except Lost as error:
        result = str(error), time.monotonic() - begin
        Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    # The other ranks' connections stay until they have their error.
    time.sleep(1)
    os._exit(0)


# Further jobs


def drop_in(ring: int, ulysses: int, uneven: bool = False, backend: str | None = None) -> None:
    """diffusers' own call on a swapped model, with its own plan."""
    model, inputs, want = _flux(text=7 if uneven else 8)
    attnproc.swap(model)
    if backend is not None:
        attnproc.set_backend(model, backend, layers="*")
    _enabled(model, ring_degree=ring, ulysses_degree=ulysses, ulysses_anything=uneven)
    kinds = {type(attn.processor) for _, attn in attnproc.interop.processors(model)}
    assert kinds == {attnproc.FluxAttnProcessor2_0}
    close(_out(model, inputs), want, "output")


def in_parts(case: Case, shape: Shape) -> None:
    """Heads that are exchanged in two parts, as those of long sequences are."""
    with mock.patch("attnproc.parallel.ulysses._LONG", 0):
        inside(case, shape)


def in_pieces(heads: int, kv_heads: int, dim: int, shape: Shape) -> None:
    """So many heads that a small part goes first and another last, with and without gradients."""
    attn = attnproc.Attention(
        query_dim=24, heads=heads, dim_head=dim, kv_heads=kv_heads,
        processor=attnproc.AttnProcessor2_0(),
    ).double()  # fmt: skip
    torch.manual_seed(0)
    for weight in attn.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = draw("pieces", "x", (2, 11, 24)).requires_grad_()
    want = attn(x)
    weight = draw("pieces", "loss", tuple(want.shape))
    (grad,) = torch.autograd.grad((want * weight).sum(), x)
    attnproc.parallelize(attn, mesh_of(shape))
    with mock.patch("attnproc.parallel.ulysses._LONG", 0):
        with torch.inference_mode():
            close(attn(x), want, "output in inference mode")
        got = attn(x)
        close(got, want, "output")
        (of_x,) = torch.autograd.grad((got * weight).sum(), x)
        close(_mean(of_x), grad, "gradient")


def one_graph(shape: Shape) -> None:
    """Compiled code takes the exchange, or the ring, as part of one graph."""
    torch.manual_seed(0)
    attn = attnproc.Attention(
        query_dim=24, heads=6, dim_head=4, processor=attnproc.AttnProcessor2_0()
    ).double()
    x = draw("graph", "x", (2, 12, 24))
    own = spans(shares(12, dist.get_world_size()))[dist.get_rank()]
    want = attn(x)[:, own]
    attnproc.parallelize(attn, mesh_of(shape), inside=False, text="split")
    compiled = torch.compile(attn, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(x[:, own]), want, "output")
    close(compiled(x[:, own]), want, "output with a gradient")


def drop_in_masked() -> None:
    """Text padding over both kinds of Flux' blocks: these join the streams themselves."""
    model, inputs, _ = _flux(text=8)
    keys = torch.arange(8 + 16)[None].expand(2, -1)
    padding = (keys < 6) | (keys >= 8)
    inputs["joint_attention_kwargs"] = {"attention_mask": padding[:, None, None]}
    attnproc.swap(model)
    want = _out(model, inputs)
    _enabled(model, ulysses_degree=2)
    close(_out(model, inputs), want, "output")


def drop_in_gradients() -> None:
    """Gradients of the weights: those of one process, summed over the ranks."""
    model, inputs, _ = _flux(text=8)
    attnproc.swap(model)
    weight = draw("flux", "loss", (2, 16, 4))
    names, weights = zip(*model.named_parameters(), strict=True)
    loss = (model(**inputs, return_dict=False)[0] * weight).sum()
    want = torch.autograd.grad(loss, weights, allow_unused=True)
    _enabled(model, ulysses_degree=2)
    loss = (model(**inputs, return_dict=False)[0] * weight).sum()
    got = torch.autograd.grad(loss, weights, allow_unused=True)
    for name, a, b in zip(names, got, want, strict=True):
        # Behind the gather and in what all tokens share every rank has the whole.
        if a is not None and b is not None and ".attn." in name:
            dist.all_reduce(a)
            close(a, b, name)


def _flux(text: int) -> tuple[Any, dict[str, Any], Tensor]:
    from tiny_models import built

    model, inputs = built("flux")
    torch.manual_seed(1)
    inputs["encoder_hidden_states"] = torch.randn(2, text, 16)
    inputs["txt_ids"] = torch.zeros(text, 3)
    model = model.double()
    inputs = {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    return model, inputs, _out(model, inputs)


def _enabled(model: Any, **degrees: Any) -> None:
    """`enable_parallelism`, which asks for an accelerator and divides by how many there are."""
    from diffusers import ContextParallelConfig

    device = torch.device("cpu")
    with (
        mock.patch("torch.accelerator.device_count", return_value=1),
        mock.patch("torch._C._get_accelerator", return_value=device),
    ):
        model.enable_parallelism(config=ContextParallelConfig(**degrees))


def _out(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs, return_dict=False)
    return out[0] if isinstance(out, tuple) else out


def whole_model(name: str, shape: Shape) -> None:
    """A model of diffusers without a plan."""
    from tiny_models import built, outputs

    model, inputs = built(name)
    attnproc.swap(model)
    want = outputs(model, inputs)
    attnproc.parallelize(model, mesh_of(shape))
    error = (outputs(model, inputs) - want).abs().max()
    assert error <= 1e-5 * want.abs().max(), f"{name} is off by {error:.1e}"
    assert attnproc.unparallelize(model) > 0
    assert torch.equal(outputs(model, inputs), want)


def captured(shape: Shape, heads: Any) -> None:
    """Maps are of the heads of all ranks, and of all rows."""
    from tiny_models import built, outputs

    model, inputs = built("unet")
    attnproc.swap(model)
    with attnproc.capture(model, part=(0, 1), heads=heads) as maps:
        outputs(model, inputs)
    attnproc.parallelize(model, mesh_of(shape))
    with attnproc.capture(model, part=(0, 1), heads=heads) as spread:
        outputs(model, inputs)
    assert maps.sums.keys() == spread.sums.keys()
    for path, want in maps.sums.items():
        assert (spread.sums[path] - want).abs().max() < 1e-5, path


def steered(shape: Shape, verb: str, args: Any, name: str = "unet") -> None:
    """What steers sees the picture and the rows as one process does."""
    from tiny_models import built, outputs

    model, inputs = built(name)
    getattr(attnproc.on(model), verb)(*args[0], **args[1])
    want = outputs(model, inputs)
    attnproc.parallelize(model, mesh_of(shape))
    error = (outputs(model, inputs) - want).abs().max()
    assert error <= 1e-5 * want.abs().max(), f"{verb} is off by {error:.1e}"


def kinds_of_masks(shape: Shape, kv_heads: int, text: Any) -> None:
    """Masks of positions, of heads, of rows, and several at once, over few key heads."""
    batch, heads, tokens = 2, 6, 10
    kinds = {
        "causal": attnproc.Causal(),
        "window": attnproc.Window(2, 3),
        "blocks": attnproc.Blocks(by_head),
        "bias": attnproc.Bias(draw("masks", "bias", (batch, heads, tokens, tokens))),
        "all": attnproc.Keys(torch.arange(tokens)[None] > 1) & attnproc.Window(3, 3),
        "both": attnproc.Bias(draw("masks", "b", (1, heads, 1, tokens))) & attnproc.Window(4, 4),
    }
    attn = attnproc.Attention(
        query_dim=24, heads=heads, dim_head=4, kv_heads=kv_heads,
        processor=attnproc.AttnProcessor2_0(),
    ).double()  # fmt: skip
    torch.manual_seed(0)
    for weight in attn.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = draw("masks", "x", (batch, tokens, 24))
    want = {name: attn(x, attention_mask=kind) for name, kind in kinds.items()}
    attnproc.parallelize(attn, mesh_of(shape), text=text)
    for name, kind in kinds.items():
        close(attn(x, attention_mask=kind), want[name], name)


def by_head(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Some keys, others for each row and head."""
    return (i + j + h + b) % 3 != 0


def refuses_mismatch(what: str) -> None:
    """Ranks that call differently hear of it before anything is exchanged."""
    rank = dist.get_rank()
    attn = attnproc.Attention(
        query_dim=16, heads=4 if what != "heads" or rank else 2, dim_head=4,
        processor=attnproc.AttnProcessor2_0(),
    )  # fmt: skip
    attnproc.parallelize(attn, mesh_of(TOKENS))
    x = torch.zeros(2, 9 + (what == "tokens") * rank, 16)
    x, attn = (x.double(), attn.double()) if what == "dtype" and rank else (x, attn)
    mask = torch.ones(2, 9) > 0 if what == "mask" and rank else None
    with pytest.raises(Disagree, match=rf"{what} is .* on rank 1"):
        attn(x, attention_mask=mask)


def refuses_settings() -> None:
    """Meshes and models that can't be spread."""
    attn = attnproc.Attention(query_dim=16, processor=attnproc.AttnProcessor2_0())
    wrong = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    with pytest.raises(ValueError, match="batch, ring, ulysses"):
        attnproc.parallelize(attn, wrong)
    with pytest.raises(ValueError, match="no attention module"):
        attnproc.parallelize(torch.nn.Linear(2, 2), mesh_of(TOKENS))
    attnproc.parallelize(attn, mesh_of(TOKENS))
    with pytest.raises(ValueError, match="unparallelize"):
        attnproc.parallelize(attn, mesh_of(TOKENS))


def same_twice(shape: Shape) -> None:
    """Sums have an order: outputs and gradients are the same to the bit."""
    case = FIRST["AttnProcessor2_0"]
    found: list[Result] = []
    for _ in range(2):
        setting = build(case, "ours", torch.float32)
        attnproc.parallelize(setting.attn, mesh_of(shape))
        found.append(evaluate(setting, setting.call(direct=False)))
    for a, b in zip(found[0].outputs, found[1].outputs, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(g, found[1].grads[name]) for name, g in found[0].grads.items())


def ring_keeps_few_keys() -> None:
    """The largest tensors of a ring are a rank's own, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.seen = max(self.seen, out.numel())
            return out

    tokens, heads, dim = 4096, 2, 16
    attn = attnproc.Attention(
        query_dim=heads * dim, heads=heads, dim_head=dim, processor=attnproc.AttnProcessor2_0()
    )
    attnproc.set_backend(attn, "chunked")
    own = tokens // dist.get_world_size()
    attnproc.parallelize(attn, mesh_of(RING), inside=False, text="split")
    x = torch.randn(1, own, heads * dim, requires_grad=True)
    with Largest() as largest:
        attn(x).sum().backward()
    # Keys and values travel as one tensor; tiles of scores are as large on any number of ranks.
    assert largest.seen <= max(2 * own * heads * dim, 1 << 20)


STEERED: dict[str, Any] = {
    "with_regions": (
        (attnproc.Region(1, 3, attnproc.Box(0, 0, 0.5, 1)), attnproc.Region(3, 5, None)),
        {},
    ),
    "with_reference": ((), {"parts": 1}),
    "with_word_weights": (({2: 1.5},), {}),
    "with_slicing": ((1,), {}),
}
MODELS = (
    "unet", "unet_kandinsky", "unet_motion", "sd3", "flux", "auraflow", "cogvideox", "hunyuan",
    "lumina", "mochi", "allegro", "sana", "stable_audio", "dc_ae", "mochi_vae",
)  # fmt: skip


class Shared:
    """Copies out of memory that processes share, in place of GPUs'."""

    def __init__(self) -> None:
        self.folder = os.environ["ATTNPROC_TEST_FOLDER"]
        self.made: dict[Any, copies.Copies] = {}
        self.posts = 0
        self.queue: list[Any] = []
        self.graph = False
        self.random = random.Random(dist.get_rank())

    def of(self, group: Any, device: torch.device) -> copies.Copies:
        if group not in self.made:
            self.made[group] = copies.Copies(self, self.memory, torch.device("cpu"))
        return self.made[group]

    def memory(self, group: Any, size: int) -> tuple[Any, list[Tensor]]:
        ranks = dist.get_process_group_ranks(group)
        _SHARED.append(None)
        names = [f"{'-'.join(map(str, ranks))}.{rank}.{len(_SHARED)}" for rank in ranks]
        paths = [Path(self.folder, name) for name in names]
        paths[dist.get_rank(group)].write_bytes(bytes(size))
        dist.barrier(group)
        byte: Any = {"shared": True, "size": size, "dtype": torch.uint8}
        return None, [torch.from_file(str(path), **byte) for path in paths]

    def start(self, pairs: Any) -> Callable[[], None]:
        """In order, as a stream of its own: soon, or only when it is waited for."""
        self.posts += 1
        self.queue.append(list(pairs))
        mine = self.posts

        def arrive() -> None:
            while self.posts - len(self.queue) < mine:
                for into, found in self.queue.pop(0):
                    into.copy_(found)

        if self.random.random() < 0.3:
            arrive()
        return arrive

    def recording(self) -> bool:
        return self.graph

    def finish(self) -> None:
        assert not self.queue


_SHARED: list[None] = []


@contextlib.contextmanager
def shared_copies() -> Iterator[Shared]:
    """Exchanges go by copies."""
    found = Shared()
    with (
        mock.patch.dict(os.environ, {"ATTNPROC_COPIES": "1"}),
        mock.patch("attnproc.parallel.copies.copies_of", found.of),
    ):
        yield found


def by_copies(job: Job) -> None:
    """A job of which exchanges go by copies."""
    with shared_copies() as shared:
        job()
    assert shared.posts


def round_four() -> None:
    """A ring of which keys are passed on, forward and backward."""
    torch.manual_seed(0)
    attn = attnproc.Attention(
        query_dim=24, heads=6, dim_head=4, processor=attnproc.AttnProcessor2_0()
    ).double()
    x = draw("four", "x", (2, 16, 24)).requires_grad_()
    own = spans(shares(16, 4))[dist.get_rank()]
    weight = draw("four", "loss", (2, 16, 24))
    want = attn(x)
    (grad,) = torch.autograd.grad((want * weight).sum(), x)
    attnproc.parallelize(attn, mesh_of((("ring", 4),)), inside=False, text="split")
    for _ in range(3):
        got = attn(x[:, own])
        close(got, want[:, own], "output")
        (of_x,) = torch.autograd.grad((got * weight[:, own]).sum(), x)
        dist.all_reduce(of_x)
        close(of_x, grad, "gradient")


def copies_in_flight() -> None:
    """Rows of any lengths, several in flight; and what graphs do, which start with any slot."""
    group, me, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    axis, draws = Axis(group, ranks, me), random.Random(7)
    with shared_copies() as shared:
        slots = shared.of(group, torch.device("cpu"))

        def burst(first: int, length: int) -> None:
            """So many exchanges, of which the copies are waited for in another order."""
            flying: list[tuple[Any, Tensor]] = []
            for n in range(first, first + length):
                dtype = draws.choice((torch.float32, torch.int64, torch.bfloat16))
                most = draws.choice((5, 1000, 40000 * (1 + n // 40)))
                table = [[draws.randrange(most) for _ in range(ranks)] for _ in range(ranks)]
                if n % 3 == 0:
                    table[n % ranks] = [0] * ranks
                way = copies.route(
                    axis, lambda i, j, t=table: t[i][j], torch.empty(0, dtype=dtype)
                )
                assert way is not None
                row = way.row(sum(table[me]), dtype)
                full = [
                    [_numbers(n, i, j, table[i][j], dtype) for j in range(ranks)]
                    for i in range(ranks)
                ]
                row.copy_(torch.cat(full[me]))
                coming = [of[me] for of in table]
                want = torch.cat([of[me] for of in full])
                flying.append((post(row, table[me], coming, axis, way=way), want))
                if draws.random() < 0.3:
                    got, want = flying.pop(draws.randrange(len(flying)))
                    assert torch.equal(got.wait(), want)
            for got, want in flying:
                assert torch.equal(got.wait(), want)

        for n in range(60):
            burst(3 * n, draws.randrange(1, 6))
        # A graph of an odd number of exchanges, replayed among others.
        shared.graph = True
        burst(0, 1)
        start = slots._turn
        for n in range(30):
            shared.graph = n % 2 == 0
            before = slots._turn
            slots._turn = start if shared.graph else before
            burst(3 * n, 3)
            if shared.graph:
                slots._turn = before


def _numbers(n: int, one: int, other: int, count: int, dtype: torch.dtype) -> Tensor:
    return ((torch.arange(count) + 31 * n + 7 * one + 3 * other) % 251).to(dtype)


def copies_fail_alike() -> None:
    """Where one rank can't share its memory none of them goes by copies."""
    axis = Axis(dist.group.WORLD, dist.get_world_size(), dist.get_rank())

    def memory(group: Any, size: int) -> Any:
        if axis.rank == 1:
            raise RuntimeError("no such memory")
        return None, [torch.zeros(size, dtype=torch.uint8)] * axis.size

    with shared_copies() as shared, mock.patch.object(shared, "memory", memory):
        assert copies.route(axis, lambda i, j: 4, torch.zeros(1)) is None
        assert shared.of(axis.group, torch.device("cpu")).why == "RuntimeError: no such memory"
        assert copies.route(axis, lambda i, j: 4, torch.zeros(1)) is None


def copies_without_gpus() -> None:
    """By default, and without GPUs, nothing is asked of the other ranks."""
    axis = Axis(dist.group.WORLD, dist.get_world_size(), dist.get_rank())
    assert copies.route(axis, lambda i, j: 4, torch.zeros(1)) is None
    with mock.patch.dict(os.environ, {"ATTNPROC_COPIES": "1"}):
        assert copies.route(axis, lambda i, j: 4, torch.zeros(1)) is None


def further() -> dict[int, dict[str, Job]]:
    """The jobs that are not of one configuration."""
    two: dict[str, Job] = {
        "drop_in-ulysses": partial(drop_in, 1, 2),
        "drop_in-ring": partial(drop_in, 2, 1),
        "drop_in-ring-chunked": partial(drop_in, 2, 1, backend="chunked"),
        "drop_in-anything": partial(drop_in, 1, 2, uneven=True),
        "drop_in-masked": drop_in_masked,
        "drop_in-gradients": drop_in_gradients,
        "settings": refuses_settings,
        "graph-ulysses": partial(one_graph, TOKENS),
        "graph-ring": partial(one_graph, RING),
        "ring-memory": ring_keeps_few_keys,
        "twice-ulysses": partial(same_twice, TOKENS),
        "twice-ring": partial(same_twice, RING),
    }
    two |= {f"model-{name}": partial(whole_model, name, TOKENS) for name in MODELS}
    two |= {f"model-rows-{name}": partial(whole_model, name, ROWS) for name in ("unet", "sana")}
    for heads in ("mean", "each", [1]):
        two[f"capture-{heads}"] = partial(captured, TOKENS, heads)
    two["capture-rows"] = partial(captured, ROWS, "mean")
    for name in ("AttnProcessor2_0", "FluxAttnProcessor2_0", "StableAudioAttnProcessor2_0"):
        two[f"parts-{name}"] = partial(in_parts, FIRST[name], TOKENS)
    gqa = next(
        case for case in PLAIN if case.id.startswith("AttnProcessor2_0") and "gqa" in case.id
    )
    two["parts-gqa"] = partial(in_parts, gqa, TOKENS)
    for heads, kv_heads, dim in ((12, 12, 4), (12, 6, 4), (7, 7, 4), (9, 9, 3), (4, 4, 4)):
        two[f"pieces-{heads}-{kv_heads}-{dim}"] = partial(in_pieces, heads, kv_heads, dim, TOKENS)
    for verb, args in STEERED.items():
        two[f"steer-{verb}"] = partial(steered, TOKENS, verb, args)
        two[f"steer-rows-{verb}"] = partial(steered, ROWS, verb, args)
    for kv_heads in (6, 3, 2, 1):
        two[f"masks-{kv_heads}"] = partial(kinds_of_masks, TOKENS, kv_heads, "split")
    for what in ("heads", "tokens", "dtype", "mask"):
        two[f"mismatch-{what}"] = partial(refuses_mismatch, what)
    two |= {
        "copies-flight": copies_in_flight,
        "copies-fail": copies_fail_alike,
        "copies-off": copies_without_gpus,
        "copies-ulysses": partial(by_copies, partial(drop_in, 1, 2)),
        "copies-ring": partial(by_copies, partial(drop_in, 2, 1)),
    }
    for heads, kv_heads, dim in ((12, 6, 4), (7, 7, 4), (9, 9, 3)):
        job = partial(in_pieces, heads, kv_heads, dim, TOKENS)
        two[f"copies-pieces-{heads}-{kv_heads}-{dim}"] = partial(by_copies, job)
    four: dict[str, Job] = {
        "copies-flight": copies_in_flight,
        "copies-pieces-14": partial(by_copies, partial(in_pieces, 14, 14, 4, FOUR)),
        "copies-pieces-2": partial(by_copies, partial(in_pieces, 2, 2, 4, FOUR)),
        "copies-both": partial(by_copies, partial(drop_in, 2, 2)),
        "copies-ring": partial(by_copies, round_four),
        "drop_in-both": partial(drop_in, 2, 2),
        "pieces-14": partial(in_pieces, 14, 14, 4, FOUR),
        "pieces-2": partial(in_pieces, 2, 2, 4, FOUR),
        "pieces-ring": partial(in_pieces, 6, 6, 4, BOTH),
        "masks-6": partial(kinds_of_masks, FOUR, 6, "split"),
        "masks-2": partial(kinds_of_masks, FOUR, 2, "split"),
        "model-all-unet": partial(whole_model, "unet", ALL),
        "model-all-sana": partial(whole_model, "sana", ALL),
        "capture-all": partial(captured, ALL, "mean"),
    }
    return {2: two, 4: four}


JOBS: dict[int, dict[str, Job]] = jobs_of(PLAIN)
_FIRST = {case.id for case in FIRST.values()}
FAST = {
    ranks: [*further()[ranks], *(n for n in jobs if n.partition("-")[2] in _FIRST)]
    for ranks, jobs in JOBS.items()
}
for _ranks, _jobs in further().items():
    JOBS[_ranks] |= _jobs


if __name__ == "__main__":
    _ranks, *_names = sys.argv[1:]
    for _name, _why in outcomes(int(_ranks), _names).items():
        print(f"{_name}: {_why or 'equal'}")
