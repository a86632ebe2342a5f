"""Kernels on a GPU: the property test, rows without keys, and memory at the shapes of real models.

    python benchmarks/kernels_gpu.py                      # about two minutes on one GPU
    python benchmarks/kernels_gpu.py --device cpu --tiny  # tries the script itself

Writes `benchmarks/results/kernels-<device>.json`. Each part stops when its share of the time is
used up, and says how many cases it had by then.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kernel_cases import check, draw_case  # noqa: E402

import attnproc  # noqa: E402
from attnproc.kernels import (  # noqa: E402
    FLEX,
    Kernel,
    ask,
    attention,
    named,
    registered,
    why_not,
)
from attnproc.kernels.functional import scoring_of  # noqa: E402
from attnproc.kernels.plan import pick  # noqa: E402
from attnproc.types import Causal, Keys, MaskKind, Scoring, Window  # noqa: E402

# Batch, query heads, key heads, queries, keys, channels; what masks the call.
SHAPES = {
    "sd15-self": (2, 8, 8, 4096, 4096, 40, ""),
    "sdxl-self": (2, 10, 10, 4096, 4096, 64, ""),
    "sdxl-cross": (2, 10, 10, 4096, 77, 64, ""),
    "sdxl-cross-padded": (2, 10, 10, 4096, 77, 64, "keys"),
    "sd35-joint": (2, 38, 38, 4429, 4429, 64, ""),
    "sd35-joint-padded": (2, 38, 38, 4429, 4429, 64, "keys"),
    "flux-double": (1, 24, 24, 4608, 4608, 128, ""),
    "flux-double-padded": (1, 24, 24, 4608, 4608, 128, "keys"),
    "auraflow": (1, 12, 12, 4352, 4352, 256, ""),
    "cogvideox5b": (1, 48, 48, 17776, 17776, 64, ""),
    "hunyuandit-self": (2, 16, 16, 4096, 4096, 88, ""),
    "mochi-padded": (2, 24, 24, 16640, 16640, 128, "keys"),
    "mochi-vae-causal": (3000, 8, 8, 28, 28, 96, "causal"),
    "lumina-padded": (2, 32, 8, 4096, 4096, 72, "keys"),
    "stable-audio-cross": (2, 24, 12, 1024, 130, 64, ""),
    "allegro": (1, 24, 24, 28800, 28800, 96, ""),
    "long-window": (1, 8, 8, 32768, 32768, 64, "window"),
}
HALF = (torch.bfloat16, torch.float16)


def property_test(kernels: list[Kernel], device: str, seconds: float, **limits: Any) -> dict:
    """Random cases until the time is up; what failed, by kernel and reason."""
    rng, until = random.Random(0), time.perf_counter() + seconds
    counts: dict[str, Counter[str]] = {kernel.name: Counter() for kernel in kernels}
    failures: list[dict[str, str]] = []
    cases = 0
    while time.perf_counter() < until and len(failures) < 40:
        case = draw_case(rng.choice, (torch.float32, *HALF), device, **limits)
        cases += 1
        for kernel in kernels:
            try:
                counts[kernel.name][check(case, kernel)] += 1
            except Exception as error:
                counts[kernel.name]["failed"] += 1
                shown = {k: str(v) for k, v in vars(case).items() if k in case.__match_args__}
                why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                failures.append({"kernel": kernel.name, "why": why, "case": str(shown)})
    return {"cases": cases, "kernels": counts, "failures": failures}


def empty_rows(device: str) -> dict[str, str]:
    """What torch's own kernels make of rows without keys: whether ours need to mend it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found: dict[str, str] = {}
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for name in backends:
        for form in ("bool", "float"):
            q, k, v = (
                torch.randn(2, 2, 64, 64, device=device, dtype=torch.bfloat16).requires_grad_()
                for _ in range(3)
            )
            mask = torch.ones(2, 1, 64, 64, dtype=torch.bool, device=device)
            mask[0] = False
            if form == "float":
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    o = F.scaled_dot_product_attention(q, k, v, mask)
                grads = torch.autograd.grad(o.sum(), (q, k, v))
            except RuntimeError as error:
                found[f"{name} {form}"] = str(error).splitlines()[0][:120]
                continue
            sizes = [f"{t[0].float().abs().max().item():.3g}" for t in (o, *grads)]
            found[f"{name} {form}"] = "o, dq, dk, dv at most " + ", ".join(sizes)
    return found


def memory(device: str, seconds: float, tiny: bool) -> dict[str, dict[str, Any]]:
    """Peak memory and time of the automatic choice, and of torch's call as diffusers makes it.

    Memory is in MiB above the inputs, forward and then with the backward pass.
    """
    rows: dict[str, dict[str, Any]] = {}
    until = time.perf_counter() + seconds
    for name, (batch, heads, kv_heads, queries, keys, dim, kind) in SHAPES.items():
        if time.perf_counter() > until:
            break
        if tiny:
            batch, queries, keys = min(batch, 3), min(queries, 96), min(keys, 96)
        shape = (batch, heads, kv_heads, queries, keys, dim)
        q, k, v, mask = _inputs(shape, kind, device)
        scoring = scoring_of(q, k, mask)
        row: dict[str, Any] = {"chosen": pick(ask(q, k, v, scoring)).name}
        row["dense_mib"] = batch * heads * queries * keys * q.element_size() / 2**20
        row["ours"] = _peak(lambda t, m=mask: attention(*t, m), (q, k, v), device)
        if kind != "window":
            row["sdpa"] = _peak(lambda t, m=mask: _as_diffusers(t, m), (q, k, v), device)
        rows[name] = row
        print(name, row, flush=True)
    return rows


def _as_diffusers(inputs: tuple[Any, ...], mask: MaskKind | None) -> torch.Tensor:
    q, k, v = inputs
    dense = mask.valid[:, None, None] if isinstance(mask, Keys) else None
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        dense,
        is_causal=isinstance(mask, Causal),
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _inputs(shape: tuple[int, ...], kind: str, device: str) -> tuple[Any, ...]:
    batch, heads, kv_heads, queries, keys, dim = shape
    q = torch.randn(batch, heads, queries, dim, device=device, dtype=torch.bfloat16)
    k, v = (
        torch.randn(batch, kv_heads, keys, dim, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    lengths = torch.linspace(keys * 0.6, keys, batch, device=device).long()
    masks: dict[str, MaskKind | None] = {
        "": None,
        "keys": Keys.first(lengths, keys),
        "causal": Causal(),
        "window": Window(512, 512),
    }
    return q, k, v, masks[kind]


def _peak(call: Callable[..., Any], inputs: tuple[Any, ...], device: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for label, grad in (("forward", False), ("backward", True)):
        leaves = tuple(t.detach().requires_grad_(grad) for t in inputs)

        def once(leaves: Any = leaves, grad: bool = grad) -> None:
            o = call(leaves)
            if grad:
                torch.autograd.grad(o, leaves, o)

        try:
            once()
            row[label] = _measured(once, device)
        except (RuntimeError, ValueError) as error:
            row[label] = {"failed": str(error).splitlines()[0][:200]}
    return row


def _measured(once: Callable[[], None], device: str) -> dict[str, float]:
    if device == "cpu":
        start = time.perf_counter()
        once()
        return {"ms": (time.perf_counter() - start) * 1e3}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        once()
    stop.record()
    torch.cuda.synchronize()
    mib = (torch.cuda.max_memory_allocated() - held) / 2**20
    return {"ms": start.elapsed_time(stop) / 3, "mib": mib}


def main() -> None:
    """Runs the parts and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device, seconds = options.device, options.seconds
    name = torch.cuda.get_device_name() if device == "cuda" else device

    probe = torch.zeros(1, 1, 16, 64, device=device, dtype=torch.bfloat16)
    asked = ask(probe, probe, probe, Scoring())
    kernels = (kernel for kernel in registered().values() if kernel != FLEX)
    usable = [kernel for kernel in kernels if not why_not(kernel.takes, asked)]
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "device": name,
        "versions": {"torch": torch.__version__, "attnproc": attnproc.__version__},
    }
    parts: dict[str, Callable[[], Any]] = {
        "empty_rows": lambda: empty_rows(device),
        "property": lambda: property_test(usable, device, seconds * 0.6),
        "memory": lambda: memory(device, seconds * 0.25, options.tiny),
        # Every shape is a compilation, so few of them.
        "flex": lambda: property_test(
            [named("flex")], device, seconds * 0.15, size=160, dims=(16, 64, 128)
        ),
    }
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels-{name.lower().replace(' ', '-')}.json"
    for part, run in parts.items():
        start = time.perf_counter()
        try:
            result[part] = run()
        except Exception:
            result[part] = {"failed": traceback.format_exc()[-2000:]}
        result[f"{part}_seconds"] = round(time.perf_counter() - start, 1)
        path.write_text(json.dumps(result, indent=1, default=dict) + "\n")
        print(part, json.dumps(result[part], default=dict)[:1500], flush=True)


if __name__ == "__main__":
    main()
