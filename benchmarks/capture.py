"""What capturing maps costs, and whether the maps lie on the things that they are of.

    python benchmarks/capture.py demo        # a step of the demo model, on a CPU
    python benchmarks/capture.py gpu         # SDXL and Flux at 1024 x 1024, under a minute
    python benchmarks/capture.py gpu --device cpu --tiny    # tries the command itself
    python benchmarks/capture.py pointing    # the pointing game on the demo model

Results go to `benchmarks/results/capture-<command>.json` with versions.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import attnproc
from attnproc.app.demo import model as demo
from attnproc.app.demo import reference, vocabulary

RESULTS = Path(__file__).parent / "results"
GROUNDS = ("yellow", "blue", "green", "pink")
WORDS = list(range(1, 11))
# Passes in one capture: a pipeline makes 20 to 50.
PASSES = 4

app = typer.Typer(add_completion=False)


@app.command("demo")
def of_demo(rounds: int = 40) -> None:
    """A step of the demo model with all words of all cross layers, beside one without."""
    torch.set_num_threads(1)
    pipeline = demo.load()
    unet: Any = pipeline.unet
    attnproc.swap(unet)
    words = {f"token {i}": i for i in range(vocabulary.LENGTH)}
    inputs = {
        "sample": torch.randn(2, 12, 32, 32),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, vocabulary.LENGTH, demo.WIDTH),
    }
    found = _compared(unet, inputs, words, "cross", rounds)
    _write("demo", {"threads": 1, "words": len(words), "layers": 7, **found})


@app.command("gpu")
def on_gpu(rounds: int = 10, device: str = "cuda", tiny: bool = False) -> None:
    """Random weights at the real shapes: the cost does not depend on what is in them."""
    import diffusers

    name = torch.cuda.get_device_name() if device == "cuda" else device
    results: dict[str, Any] = {"device": name, "words": len(WORDS), "tiny": tiny}
    side, width = (16, 32) if tiny else (128, 320)
    sdxl = _filled(
        diffusers.UNet2DConditionModel,
        device,
        sample_size=side,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width, 4 * width),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20) if not tiny else (1, 2, 4),
        cross_attention_dim=2048,
        use_linear_projection=True,
    )
    results["sdxl"] = _compared(sdxl, _sdxl_inputs(device, side), WORDS, "cross", rounds)
    del sdxl
    if device == "cuda":
        torch.cuda.empty_cache()
    # A quarter of the depth, with as many double blocks to a single one.
    flux = _filled(
        diffusers.FluxTransformer2DModel,
        device,
        num_layers=1 if tiny else 5,
        num_single_layers=2 if tiny else 10,
        num_attention_heads=1 if tiny else 24,
        guidance_embeds=True,
    )
    inputs = _flux_inputs(device, (side // 2) ** 2)
    results["flux"] = _compared(flux, inputs, WORDS, "joint", rounds)
    _write("gpu", results, save=not tiny)


@app.command()
def pointing(count: int = 96, batch: int = 8) -> None:
    """Where the map of a word is largest: on the thing, for its name and for its ground."""
    torch.set_num_threads(1)
    known = reference.load()
    single = sorted({label for label in known.labels if label.isalpha()})
    names = single[:: len(single) // count][:count]
    pipeline: Any = demo.load()
    pipeline.set_progress_bar_config(disable=True)
    attnproc.swap(pipeline.unet)
    rows: list[dict[str, float]] = []
    for start in range(0, len(names), batch):
        some = names[start : start + batch]
        grounds = [GROUNDS[(start + i) % len(GROUNDS)] for i in range(len(some))]
        prompts = [
            f"{name} on a {ground} background" for name, ground in zip(some, grounds, strict=True)
        ]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(some))]
        with (
            torch.inference_mode(),
            attnproc.capture(pipeline.unet, {"thing": 1, "a": 3, "ground": 4}) as maps,
        ):
            pictures = pipeline(
                prompts, num_inference_steps=20, guidance_scale=3.0, generator=seeds
            ).images
        weights = maps.mean(tokens=256)
        rows += [_scores(np.asarray(p), w) for p, w in zip(pictures, weights, strict=True)]
    mean = {key: round(statistics.mean(row[key] for row in rows), 3) for key in rows[0]}
    _write("pointing", {"pictures": len(rows), "prompt": "THING on a GROUND background", **mean})


def _scores(picture: np.ndarray[Any, Any], weights: Tensor) -> dict[str, float]:
    """Whether the largest weight of each word is on the thing, and how much weight is there."""
    levels = picture.astype(int)
    edge = np.concatenate((levels[0], levels[-1], levels[:, 0], levels[:, -1]))
    away = np.abs(levels - np.median(edge, axis=0)).max(axis=-1) > 48
    cells = away.reshape(16, 4, 16, 4).mean(axis=(1, 3)).ravel() >= 0.5
    found = {"chance": float(cells.mean())}
    for name, weight in zip(("thing", "a", "ground"), weights.flatten(1).numpy(), strict=True):
        found[f"{name}_hits"] = float(cells[weight.argmax()])
        found[f"{name}_weight"] = float(weight[cells].sum() / weight.sum())
    return found


@torch.inference_mode()
def _compared(
    model: nn.Module, inputs: dict[str, Any], words: Any, kind: Any, rounds: int
) -> dict[str, Any]:
    """Median milliseconds of a forward pass with and without capture, some of each by turns."""
    attnproc.swap(model)
    if kind == "joint":
        attnproc.on(model).with_text(inputs["encoder_hidden_states"].shape[1])
    run: Callable[[], Tensor] = lambda: model(**inputs, return_dict=False)[0]  # noqa: E731
    capture = lambda: attnproc.capture(model, words, kind=kind, part=(0, 1))  # noqa: E731
    times: dict[str, list[float]] = {"plain": [], "captured": []}
    outs: dict[str, Tensor] = {}
    for _ in range(rounds + 2):
        for name in times:
            with capture() if name == "captured" else nullcontext():
                seconds, outs[name] = _timed(run)
            times[name].append(1000 * seconds)
    plain, captured = (statistics.median(some[2:]) for some in times.values())
    return {
        "passes": PASSES,
        "plain_ms": round(plain, 2),
        "captured_ms": round(captured, 2),
        "overhead_percent": round(100 * (captured / plain - 1), 1),
        "same_output": torch.equal(*outs.values()),
    }


def _timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of a pass, and the outcome of the last one."""
    _wait()
    start = time.perf_counter()
    outs = [run() for _ in range(PASSES)]
    _wait()
    return (time.perf_counter() - start) / PASSES, outs[-1]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _filled(kind: Any, device: str, **config: Any) -> nn.Module:
    """A model of random weights in bfloat16, made on its device."""
    with torch.device("meta"):
        model = kind(**config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.normal_(0, 0.02)
    return model


def _sdxl_inputs(device: str, side: int) -> dict[str, Any]:
    half: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return {
        "sample": torch.randn(2, 4, side, side, **half),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 77, 2048, **half),
    }


def _flux_inputs(device: str, tokens: int) -> dict[str, Any]:
    half: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, tokens, 64, **half),
        "encoder_hidden_states": torch.randn(1, 512, 4096, **half),
        "pooled_projections": torch.randn(1, 768, **half),
        "timestep": torch.tensor([0.5], **half),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(512, 3, device=device),
        "guidance": torch.tensor([3.5], **half),
    }


def _write(name: str, found: dict[str, Any], save: bool = True) -> None:
    versions = {p: version(p) for p in ("torch", "diffusers")}
    report = {"versions": {"python": platform.python_version(), **versions}, **found}
    path = RESULTS / f"capture-{name}.json"
    if save:
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.name, json.dumps(found))


if __name__ == "__main__":
    app()
