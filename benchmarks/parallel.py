"""Whole models over several GPUs: one GPU, ours and diffusers' Ulysses and ring, in one run.

    torchrun --nproc-per-node 2 benchmarks/parallel.py                 # about four minutes
    torchrun --nproc-per-node 2 benchmarks/parallel.py --device cpu --tiny   # tries itself

First a gate: outputs and gradients of attention over all ranks against one process, and each
model's output against that of one GPU. Then times (the slowest rank's median) and peak memory.
Writes `parallel-<device>-x<ranks>.json` with the versions and the command.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
from diffusers import ContextParallelConfig  # noqa: E402
from diffusers.models._modeling_parallel import (  # noqa: E402
    ContextParallelInput,
    ContextParallelOutput,
)

import attnproc  # noqa: E402
from attnproc.parallel.exchange import shares, spans  # noqa: E402

# What a half precision output may differ by, relative to its root mean square.
ALLOWED = 0.03


@dataclass(frozen=True)
class Model:
    """A model and a call of it.

    Attributes:
        name: What it is called.
        make: Makes the model and its inputs.
        plan: Which inputs of which layer are split, where diffusers has none.
    """

    name: str
    make: Callable[[str, torch.dtype, bool], tuple[Any, dict[str, Any]]]
    plan: dict[str, Any] | None = None


def flux(image: int, text: int) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Flux with 2 double and 6 single blocks."""

    def make(device: str, dtype: torch.dtype, tiny: bool) -> tuple[Any, dict[str, Any]]:
        small = {
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        }
        model = diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=6, **(small if tiny else {})
        )
        tokens, words = (64, 16) if tiny else (image, text)
        wide = model.config.joint_attention_dim
        options: Any = {"device": device, "dtype": dtype}
        inputs = {
            "hidden_states": torch.randn(1, tokens, model.config.in_channels, **options),
            "encoder_hidden_states": torch.randn(1, words, wide, **options),
            "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, **options),
            "timestep": torch.tensor([0.5], **options),
            "img_ids": torch.randint(0, 64, (tokens, 3), device=device).to(dtype),
            "txt_ids": torch.zeros(words, 3, **options),
        }
        return model, inputs

    return make


def cogvideox(device: str, dtype: torch.dtype, tiny: bool) -> tuple[Any, dict[str, Any]]:
    """CogVideoX-5b with 4 of its 42 layers: 49 frames of 480 x 720 pixels."""
    heads, frames, height, width = (2, 3, 8, 12) if tiny else (48, 13, 60, 90)
    words, wide = (8, 32) if tiny else (226, 4096)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        num_layers=2 if tiny else 4,
        text_embed_dim=wide,
        max_text_seq_length=words,
        sample_width=width,
        sample_height=height,
        sample_frames=9 if tiny else 49,
        use_rotary_positional_embeddings=True,
    )
    angles = torch.randn(frames * height * width // 4, 64, device=device)
    options: Any = {"device": device, "dtype": dtype}
    inputs = {
        "hidden_states": torch.randn(1, frames, 16, height, width, **options),
        "encoder_hidden_states": torch.randn(1, words, wide, **options),
        "timestep": torch.tensor([500.0], **options),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return model, inputs


_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_TABLE = ContextParallelInput(split_dim=0, expected_dims=2)
COGVIDEOX_PLAN = {
    "transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS},
    "transformer_blocks.*": {"image_rotary_emb": [_TABLE, _TABLE]},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}
MODELS = (
    Model("flux-16384+512", flux(16384, 512)),
    Model("flux-4096+512", flux(4096, 512)),
    Model("cogvideox-17550+226", cogvideox, COGVIDEOX_PLAN),
)

# Whose attention, and over which axis; theirs gives the log-sum-exp by cuDNN alone.
SIDES = ("ours", "theirs", "ours-ulysses", "theirs-ulysses", "ours-ring", "theirs-ring")
# Also replayed as a CUDA graph, where Python takes no time.
GRAPHS = ("ours", "ours-ulysses", "ours-ring")


def made(model: Model, side: str, device: str, dtype: torch.dtype, tiny: bool) -> Any:
    """The model made ready for a side, with the same weights and inputs every time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            net, inputs = model.make(device, dtype, tiny)
    finally:
        torch.set_default_dtype(before)
    net.eval()
    whose, _, kind = side.partition("-")
    if whose == "ours":
        attnproc.swap(net)
    elif kind and device != "cpu":
        net.set_attention_backend("_native_cudnn")
    if kind:
        config = ContextParallelConfig(**{f"{kind}_degree": dist.get_world_size()})
        enable(net, config, model.plan, device)
    return net, inputs


def enable(net: Any, config: Any, plan: Any, device: str) -> None:
    """`enable_parallelism`, which wants an accelerator: on a CPU with stand-ins."""
    if device != "cpu":
        net.enable_parallelism(config=config, cp_plan=plan)
        return
    with (
        mock.patch("torch.accelerator.device_count", return_value=1),
        mock.patch("torch._C._get_accelerator", return_value=torch.device("cpu")),
    ):
        net.enable_parallelism(config=config, cp_plan=plan)


@torch.inference_mode()
def measured(net: Any, inputs: Any, device: str, seconds: float) -> tuple[Tensor, dict[str, Any]]:
    """The output, and times and memory of the slowest rank."""
    gpu = device != "cpu"

    def call() -> Tensor:
        return net(**inputs, return_dict=False)[0]

    out = call()
    for _ in range(3 if gpu else 1):
        call()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if gpu else 0
    row: dict[str, Any] = timed(call, device, seconds)
    row["MiB"] = (torch.cuda.max_memory_allocated() - held) >> 20 if gpu else 0
    return out, row


@torch.inference_mode()
def replayed(net: Any, inputs: Any, device: str, seconds: float) -> dict[str, Any]:
    """Times of the call as a CUDA graph, collectives and all."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        net(**inputs, return_dict=False)
    return timed(graph.replay, device, seconds)


def timed(call: Callable[[], Any], device: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of the slowest rank."""
    times: list[float] = []
    spent, least, most = 0.0, 3, 20 if device != "cpu" else 3
    # The slowest rank's time is the same on all, so that all make the same number of calls.
    while len(times) < least or (spent < seconds and len(times) < most):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        took = torch.tensor(time.perf_counter() - start, device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        times.append(took.item() * 1e3)
        spent += took.item()
    return {
        "ms": round(statistics.median(times), 2),
        "fastest": round(min(times), 2),
        "calls": len(times),
    }


def gate(device: str, dtype: torch.dtype, tiny: bool) -> list[dict[str, Any]]:
    """Outputs and gradients of attention over the ranks against one process in float32."""
    backends = ("auto", "chunked") if device == "cpu" else ("auto", "cudnn", "flash_sdpa")
    found: list[dict[str, Any]] = []
    world, rank = dist.get_world_size(), dist.get_rank()
    for kind in ("ulysses", "ring"):
        mesh = init_device_mesh(device, (world,), mesh_dim_names=(kind,))
        for backend in backends:
            torch.manual_seed(0)
            heads, dim, tokens = 8, 64, 64 if tiny else 2048
            with torch.device(device):
                attn = attnproc.Attention(
                    query_dim=heads * dim, heads=heads, dim_head=dim,
                    processor=attnproc.AttnProcessor2_0(),
                )  # fmt: skip
                x = torch.randn(2, tokens, heads * dim, requires_grad=True)
                weight = torch.randn(2, tokens, heads * dim)
            want = attn(x)
            (want_x,) = torch.autograd.grad((want * weight).sum(), x)
            attn.to(dtype)
            attnproc.set_backend(attn, backend)
            attnproc.parallelize(attn, mesh, inside=False, text="split")
            own = spans(shares(tokens, world))[rank]
            got = attn(x[:, own].to(dtype))
            (got_x,) = torch.autograd.grad((got * weight[:, own]).float().sum(), x)
            dist.all_reduce(got_x)
            error = {
                "output": off(got, want[:, own]),
                "gradient": off(got_x, want_x),
            }
            found.append({"kind": kind, "backend": backend, **error})
            if max(error.values()) > ALLOWED:
                raise SystemExit(f"gate: {found[-1]}")
    return found


def off(got: Tensor, want: Tensor) -> float:
    """The root mean square error relative to the root mean square, on the worst rank."""
    error = (got.float() - want.float()).square().mean().sqrt()
    error = (error / want.float().square().mean().sqrt()).detach()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return round(error.item(), 5)


def link(device: str) -> dict[str, float]:
    """GB/s a rank sends in an all-to-all and to its neighbour."""
    size = (1 << 20) if device == "cpu" else (1 << 28)
    from attnproc.parallel.config import spread_over

    axis = spread_over(init_device_mesh(device, (dist.get_world_size(),))).ulysses
    t = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    rates: list[float] = []
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(torch.empty_like(t), t, group=axis.group)
        if device != "cpu":
            torch.cuda.synchronize()
        sent = t.numel() * 2 * (axis.size - 1) / axis.size
        rates.append(sent / (time.perf_counter() - start) / 1e9)
    return {"all_to_all_GB_s": round(statistics.median(rates[2:]), 1)}


def main() -> None:
    """Runs the gate, then every side of every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each measurement")
    options = parser.parse_args()
    device, gpu = options.device, options.device != "cpu"
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=120))
    dtype = torch.bfloat16 if gpu else torch.float32

    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    name = torch.cuda.get_device_name() if gpu else "cpu"
    result: dict[str, Any] = {
        "device": name,
        "ranks": ranks,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "attnproc": attnproc.__version__,
        "commit": os.environ.get("COMMIT", ""),
        "command": " ".join(["torchrun", "--nproc-per-node", str(ranks), *sys.argv]),
        "gate": gate(device, dtype, options.tiny),
        "link": link(device),
        "rows": [],
    }
    if first:
        print(json.dumps({**result, "rows": 0}, indent=1), flush=True)
    file = options.out / f"parallel-{name.lower().replace(' ', '-')}-x{ranks}.json"
    for model in MODELS:
        if options.only not in model.name:
            continue
        want: Tensor | None = None
        for side in SIDES:
            try:
                net, inputs = made(model, side, device, dtype, options.tiny)
                out, row = measured(net, inputs, device, options.seconds)
                want = out if want is None else want
                row |= {"model": model.name, "side": side, "error": off(out, want)}
                if gpu and side in GRAPHS:
                    row["graph"] = replayed(net, inputs, device, options.seconds)["ms"]
            except (RuntimeError, ValueError, NotImplementedError) as error:
                reason = (str(error).splitlines() or [""])[0][:200]
                row = {
                    "model": model.name,
                    "side": side,
                    "failed": f"{type(error).__name__}: {reason}",
                }
            if side.startswith("ours") and row.get("error", 1.0) > ALLOWED:
                raise SystemExit(f"{model.name} {side}: {row}")
            result["rows"].append(row)
            net = inputs = out = None
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
            if first:
                print(json.dumps(row), flush=True)
                file.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
