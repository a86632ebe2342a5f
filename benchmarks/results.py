"""A results file: written after every row, so that a run which is killed keeps what it has."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import attnproc

__all__ = ["RESULTS", "Results", "commit_here", "geomean", "machine"]

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parents[1]


class Results:
    """Rows of results with the runs that they came from.

    Args:
        path: Where the JSON goes.
        device: "cpu" or "cuda".
        commit: What was measured.
        merge: Whether rows in the file stay, and take up what is new; else they go.
        settings: Options of the run that a reader needs.

    Raises:
        ValueError: The file to merge with is of another machine or other settings.
    """

    def __init__(
        self, path: Path, device: str, commit: str, *, merge: bool = False, **settings: Any
    ) -> None:
        self.path, self._start = path, time.perf_counter()
        same = {**machine(device), **settings}
        self.data: dict[str, Any] = {**same, "runs": [], "rows": {}}
        if merge and path.exists():
            self.data = json.loads(path.read_text())
            for name, value in same.items():
                if self.data.get(name) != value:
                    raise ValueError(
                        f"merge: {path.name} has {name} {self.data.get(name)!r}, this run "
                        f"{value!r}; give another --out"
                    )
        self._run = {"command": " ".join(sys.argv), "commit": commit, "seconds": 0.0}
        self.data["runs"].append(self._run)

    @property
    def rows(self) -> dict[str, Any]:
        """Results by row."""
        return self.data["rows"]

    def quieter(self, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """Of a row that was measured again, the modes in which all sides together took less.

        Who shares a machine slows all of them, for seconds at a time. A pass in which a side
        failed takes the place of none in which it did not.
        """
        old = self.rows[name]
        keys = {key for key in found.get("ours", {}) if key.endswith("_ms") and "_min_" not in key}
        better = {key for key in keys if _is_quieter(_sides(found, key), _sides(old, key))}
        taken = better | {key.replace("_ms", "_min_ms") for key in better}
        return {
            side: {key: value for key, value in times.items() if key in taken}
            for side, times in found.items()
            if isinstance(times, Mapping) and side in old
        }

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        """Takes in a row, or more modes of one, and writes the file."""
        merge(self.rows.setdefault(name, {}), found)
        self._run["seconds"] = round(time.perf_counter() - self._start, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one step, since the run may be killed amid it.
        written = self.path.with_suffix(".part")
        written.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(written, self.path)


def _sides(found: Mapping[str, Any], key: str) -> dict[str, float]:
    """What each side has under a key."""
    sides = ((name, side) for name, side in found.items() if isinstance(side, Mapping))
    return {name: side[key] for name, side in sides if key in side}


def _is_quieter(new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Whether a pass has more sides than one before, or took less for the same."""
    if new.keys() == old.keys():
        return sum(new.values()) < sum(old.values())
    return new.keys() > old.keys()


def merge(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Puts `new` into `old`, level by level; what both have is of `new`."""
    for name, value in new.items():
        if isinstance(value, Mapping) and isinstance(old.get(name), dict):
            merge(old[name], value)
        else:
            old[name] = value


def machine(device: str) -> dict[str, Any]:
    """The device and the versions of what matters."""
    versions = {"python": platform.python_version(), "attnproc": attnproc.__version__}
    for package in ("torch", "triton", "diffusers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        return {"device": torch.cuda.get_device_name(), "versions": versions}
    # What instructions torch uses decides how fast half precision is.
    name = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def _processor() -> str:
    """The model of the CPU where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit_here() -> str:
    """The commit of the sources, with a mark where they were changed; "unknown" without git."""
    try:
        found = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "attnproc", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + "+" * bool(changed)


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True, timeout=20
    )
    return done.stdout.strip()


def geomean(values: list[float]) -> float:
    """Geometric mean; NaN of nothing."""
    logs = torch.tensor(values, dtype=torch.float64).log()
    return logs.mean().exp().item()
