"""Stored results of diffusers, for machines without it; run as a script, this makes them.

`golden.safetensors` holds, a case, an evenly spaced sample of each output with its norm, and the
norm of every gradient. They come from diffusers (the version stands in the file's metadata) in
float64 on the CPU, from weights and inputs that anyone can draw again (`specs.draw`).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnproc.verify import fakes
from attnproc.verify.cases import CASES
from attnproc.verify.check import digest, expected, quiet

__all__ = ["PATH", "load_golden", "make_golden"]

PATH = Path(__file__).with_name("golden.safetensors")


def load_golden() -> dict[str, Tensor]:
    """The stored results, by case and output."""
    return load_file(PATH)


def make_golden() -> dict[str, Tensor]:
    """Run diffusers on every case that it gets right."""
    kept: dict[str, Tensor] = {}
    with fakes.installed(), quiet():
        for case in CASES:
            if case.compare == "diffusers":
                found = digest(expected(case))
                kept |= {f"{case.id}/{name}": tensor for name, tensor in found.items()}
    return kept


if __name__ == "__main__":
    made = make_golden()
    source = {
        "made by": f"diffusers {version('diffusers')}, torch {torch.__version__}, float64, CPU"
    }
    save_file(made, PATH, metadata=source)
    print(f"{PATH.name}: {len(made)} tensors, {PATH.stat().st_size / 2**20:.2f} MiB")
