"""Bars of every row: how far from the floor, or how many times as fast as diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw"]

GREY, BLUE = "#b0b0b0", "#2a6fb0"


def draw(data: Mapping[str, Any], path: Path, floor: bool) -> None:
    """Draws the rows of a results file.

    Args:
        data: The file; nothing is drawn of an empty one.
        path: Where the picture goes.
        floor: Whether bars are times over the floor, else speeds beside diffusers'.
    """
    rows = {name: row for name, row in data.get("rows", {}).items() if "ours" in row}
    if floor:
        rows = {n: r for n, r in rows.items() if "floor" in r and "graph_ms" in r["ours"]}
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.24 * len(rows) + 1.2), layout="constrained")
    places = range(len(rows), 0, -1)
    if floor:
        _over_floor(axes, rows, places)
    else:
        _speeds(axes, rows, places)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(list(places), list(rows), fontsize=8)
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _over_floor(axes: Any, rows: Mapping[str, Any], places: range) -> None:
    for side, color, shift in (("diffusers", GREY, 0.2), ("ours", BLUE, -0.2)):
        values = [
            row.get(side, {}).get("graph_ms", float("nan")) / row["floor"]["ms"]
            for row in rows.values()
        ]
        label = "attnproc" if side == "ours" else side
        axes.barh([p + shift for p in places], values, 0.4, color=color, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("GPU time over the floor")
    axes.legend(frameon=False)


def _speeds(axes: Any, rows: Mapping[str, Any], places: range) -> None:
    values = [row["diffusers"]["eager_ms"] / row["ours"]["eager_ms"] for row in rows.values()]
    axes.barh(list(places), values, 0.7, color=BLUE)
    axes.set_xlabel("times as fast as diffusers")
