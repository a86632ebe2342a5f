"""Writes what is in benchmarks/results into pages of docs and README.md, between markers.

    python benchmarks/report.py            # the pages and the plots
    python benchmarks/report.py --check    # fails where a page is out of date

No figure is typed: a section whose results are missing says so. Words on single rows are in
`benchmarks/notes.toml`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import tomllib
import typer

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PAGES = tuple(ROOT / page for page in ("docs/performance.md", "docs/parallel.md", "README.md"))
IMAGES = ROOT / "docs" / "images"

# Of an H200, measured: dense products in bf16, and memory.
FLOP_PER_MS, BYTES_PER_MS = 790e9, 4.3e9
# Below this a difference is the spread of two measurements of one call.
SPREAD = 1.02
GOALS = {"graph": 1.10, "eager": 1.35, "compiled": 1.15}
NAMES = {
    "graph": "GPU time alone, over the floor",
    "eager": "wall time of eager calls, over the floor",
    "compiled": "under `torch.compile`, over the floor",
}
# What is said of a mode beside the same mode of the floor's own calls.
BESIDE = {
    "graph": "GPU time alone, over the larger of the floor and a graph of its calls",
    "eager": "wall time of eager calls, over the larger of the floor and its calls' launches",
    "compiled": "under `torch.compile`, over the larger of the floor and its calls compiled",
}
LEAST = "eager calls by the fastest batch of each row, over the floor"
GPU_PLOT, CPU_PLOT = "performance-gpu.png", "performance-cpu.png"
MISSING = "Not measured yet."
# What is told of models over several GPUs, and of whose attention over which axis.
PARALLEL = {
    "ms": "ms, median",
    "fastest": "ms, fastest call",
    "graph": "ms, as a graph",
    "MiB": "MiB",
}
# diffusers' processor of CogVideoX lets each rank attend to its own tokens alone.
WRONG = "cogvideox-17550+226"
SIDES = ("ours", "theirs", "ours-ulysses", "theirs-ulysses", "ours-ring", "theirs-ring")

Data = Mapping[str, Any]


def main(
    check: Annotated[bool, typer.Option(help="Write nothing; fail if a page is old.")] = False,
) -> None:
    """Brings the pages up to date."""
    old = [page.name for page in PAGES if page.read_text() != filled(page.read_text())]
    if check:
        if old:
            print(f"out of date: {', '.join(old)}; run python benchmarks/report.py")
            raise typer.Exit(1)
        return
    from plots import draw

    draw(results("run-cuda-bf16"), IMAGES / GPU_PLOT, floor=True)
    draw(results("run-cpu-fp32"), IMAGES / CPU_PLOT, floor=False)
    for page in PAGES:
        page.write_text(filled(page.read_text()))


def filled(page: str) -> str:
    """A page with every section that it has markers for."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}: by benchmarks/report.py -->", f"<!-- end of {name} -->"
        head, found, rest = page.partition(begin)
        if found:
            page = f"{head}{begin}\n{section().strip()}\n{end}{rest.partition(end)[2]}"
    return page


def results(name: str) -> dict[str, Any]:
    """A results file; empty where there is none of today's form."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if "runs" in found else {}


def about(data: Data) -> str:
    """The machine, the versions and the commands, as a line."""
    versions = ", ".join(f"{name} {v}" for name, v in data["versions"].items() if name != "python")
    threads = f", {data['threads']} threads" if "threads" in data else ""
    commands = "; ".join(f"`{run['command']}` at {run['commit']}" for run in data["runs"])
    return f"{data['device']}{threads}; {versions}; {commands}."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table whose first column is words."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gpu_summary() -> str:
    """The goals of the whole table."""
    data = results("run-cuda-bf16")
    rows = good(data)
    if not rows:
        return MISSING
    lines = [
        [NAMES[mode], over_floor(rows, "diffusers", mode), over_floor(rows, "ours", mode), goal]
        for mode, goal in ((mode, f"{GOALS[mode]:.2f}") for mode in GOALS)
    ]
    least = [over_floor(rows, side, "eager_min") for side in ("diffusers", "ours")]
    lines.insert(1 + list(GOALS).index("eager"), [LEAST, *least, "–"])
    for mode, what in BESIDE.items():
        both = [over_calls(rows, side, mode) for side in ("diffusers", "ours")]
        if "–" not in both:
            place = 1 + next(i for i, line in enumerate(lines) if line[0] == NAMES[mode])
            lines.insert(place, [what, *both, "–"])
    memory = pairs(rows, "peak_mib")
    if memory:
        most = max(ours / theirs for ours, theirs in memory.values())
        lines.append(["peak memory beside diffusers', largest", "1", f"{most:.2f}", "1"])
    gain = pairs(rows, "backward_ms")
    if gain:
        lines.append(["forward and backward, times as fast", "1", speedup(gain), "1.3"])
    text = table(("geometric mean over the rows", "diffusers", "attnproc", "goal"), lines)
    slow = "\n".join(f"- {mode}: {slower(rows, mode)}" for mode in GOALS)
    traced = [name for name, row in rows.items() if "breaks" in row["ours"]]
    breaks = [name for name in traced if rows[name]["ours"]["breaks"]]
    broken = (", ".join(breaks) or "none") if traced else "not measured"
    return (
        f"{text}\n\nRows where diffusers is faster by more than {SPREAD - 1:.0%}:\n\n{slow}\n\n"
        f"Rows with a graph break: {broken}.\n\n"
        f"![GPU time over the floor, by row](images/{GPU_PLOT})\n\n{about(data)}"
    )


def gpu_rows() -> str:
    """Every row in every mode."""
    data = results("run-cuda-bf16")
    rows = good(data)
    if not rows:
        return MISSING
    head = (
        *("row", "floor", "its calls", "as a graph", "compiled"),
        *("eager", "host", "graph", "compiled", "peak MiB", "graph / floor"),
    )
    keys_of_floor = ("eager_ms", "graph_ms", "compiled_ms")
    keys = ("eager_ms", "host_ms", "graph_ms", "compiled_ms", "peak_mib")
    lines = [
        [
            name,
            *(number(row.get("floor", {}).get(key)) for key in ("ms", *keys_of_floor)),
            *(change(row, key) for key in keys),
            ratio(row, "ours", "graph"),
        ]
        for name, row in rows.items()
    ]
    return table(head, lines) + failures(data)


def gpu_replayed() -> str:
    """Calls bound by launches, under the compiler's mode that replays them."""
    rows = good(results("run-cuda-bf16"))
    found = {name: row for name, row in rows.items() if "replayed_ms" in row["ours"]}
    if not found:
        return MISSING
    keys = ("eager_ms", "compiled_ms", "replayed_ms", "graph_ms")
    lines = [
        [name, number(row.get("floor", {}).get("ms")), *(change(row, key) for key in keys)]
        for name, row in found.items()
    ]
    head = ("row", "floor", "eager", "compiled", "replayed", "graph")
    return table(head, lines)


def gpu_backward() -> str:
    """Forward and backward passes."""
    rows = good(results("run-cuda-bf16"))
    found = {name: row for name, row in rows.items() if "backward_ms" in row["ours"]}
    if not found:
        return MISSING
    keys = ("backward_ms", "backward_graph_ms", "backward_peak_mib")
    lines = [[name, *(change(row, key) for key in keys)] for name, row in found.items()]
    mean = speedup(pairs(rows, "backward_ms"))
    head = ("row", "wall time", "GPU time", "peak MiB")
    return f"{table(head, lines)}\n\nGeometric mean: {mean} times as fast."


def denoisers() -> str:
    """Whole models."""
    data = results("denoisers-cuda-bf16")
    rows = good(data)
    if not rows:
        return MISSING
    least = pairs(rows, "eager_min_ms")
    lines = [
        [
            name, change(row, "eager_ms"), _by_one(least.get(name)), change(row, "host_ms"),
            change(row, "peak_mib"),
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    head = ("model", "eager", "by the fastest", "host", "peak MiB")
    return f"{table(head, lines)}{failures(data)}\n\n{about(data)}"


def two_gpus() -> str:
    """Whole models over two GPUs."""
    path = RESULTS / "parallel-nvidia-h200-x2.json"
    if not path.exists():
        return MISSING
    data = json.loads(path.read_text())
    lines: list[list[str]] = []
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        of = {row["side"]: row for row in data["rows"] if row["model"] == model}
        wrong = ("theirs-ulysses", "theirs-ring") if model == WRONG else ()
        for key, what in PARALLEL.items():
            cells = ["wrong" if side in wrong else _beside_one(of, side, key) for side in SIDES]
            lines.append([model if key == "ms" else "", what, *cells])
    names = (side.replace("ours", "attnproc").replace("theirs", "diffusers") for side in SIDES)
    head = ("model", "", *(name.replace("-", ", ") for name in names))
    versions = ", ".join(f"{name} {data[name]}" for name in ("attnproc", "torch", "diffusers"))
    sent = data["link"]["all_to_all_GB_s"]
    return (
        f"{table(head, lines)}\n\n{data['ranks']} x {data['device']}, {sent:.0f} GB/s each way; "
        f"{versions}; `{data['command']}` at {data['commit']}."
    )


def _beside_one(of: Data, side: str, key: str) -> str:
    """A figure, and how many times as good it is as one GPU's of the same library."""
    row = of.get(side, {})
    if key not in row:
        return "–"
    one = of.get(side.partition("-")[0], {}).get(key)
    alone = "-" not in side or not one
    return f"{row[key]}" if alone else f"{row[key]} ({one / row[key]:.2f})"


def bounds() -> str:
    """Row by row: arithmetic, what was done, what came of it."""
    notes = tomllib.loads((HERE / "notes.toml").read_text())
    counts = json.loads((RESULTS / "bounds.json").read_text())["rows"]
    rows = good(results("run-cuda-bf16"))
    head = ("row", "by arithmetic", "bound", "done", "prediction", "outcome")
    lines = [
        [
            name,
            arithmetic(count),
            *(notes.get(name, {}).get(key) or "–" for key in ("bound", "done", "prediction")),
            outcome(rows.get(name)),
        ]
        for name, count in counts.items()
    ]
    return table(head, lines).replace("---:", "---")


def arithmetic(count: Data) -> str:
    """What a call must do at least, and what diffusers' does besides."""
    products, attention = (count[k] / FLOP_PER_MS for k in ("product_flop", "attention_flop"))
    moved, passes = (count[key] / BYTES_PER_MS for key in ("product_bytes", "pass_bytes"))
    parts = [f"products {number(products)} ms"]
    if attention:
        parts.append(f"attention {number(attention)} ms")
    parts += [
        f"their memory {number(moved)} ms",
        f"other passes ({count['passes']}) {number(passes)} ms",
        f"{count['launches']} operators",
    ]
    return ", ".join(parts)


def outcome(row: Data | None) -> str:
    """What the GPU took, before and after."""
    if row is None or "graph_ms" not in row["ours"]:
        return "–"
    return f"GPU {change(row, 'graph_ms')}, {ratio(row, 'ours', 'graph')} of the floor"


def cpu(dtype: str) -> Callable[[], str]:
    """The rows on a CPU."""

    def section() -> str:
        data = results(f"run-cpu-{dtype}")
        rows = good(data)
        if not rows:
            return MISSING
        lines = [
            [
                name,
                shape(row),
                change(row, "eager_ms"),
                gain(row, "eager_min_ms"),
                change(row, "peak_mib"),
            ]
            for name, row in rows.items()
        ]
        head = ("row", "input", "ms", "by the fastest", "peak MiB")
        plot = f"![Times as fast on a CPU](images/{CPU_PLOT})\n\n" if dtype == "fp32" else ""
        means = [speedup(pairs(rows, key)) for key in ("eager_ms", "eager_min_ms")]
        return (
            f"{table(head, lines)}{failures(data)}\n\n"
            f"Geometric mean: {means[0]} times as fast by the medians, {means[1]} by the fastest "
            f"call of each. Rows where diffusers is faster by more than {SPREAD - 1:.0%}: "
            f"{slower(rows, 'eager')}.\n\n{plot}{about(data)}"
        )

    return section


def variants() -> str:
    """Shapes that no listed row has."""
    parts = [_variants(f"variants-cuda-{dtype}") for dtype in ("bf16", "fp16", "fp32")]
    return "\n\n".join(filter(None, parts)) or MISSING


def _variants(name: str) -> str:
    data = results(name)
    rows = good(data)
    if not rows:
        return ""
    keys = ("eager_ms", "graph_ms")
    lines = [[name, shape(row), *(change(row, k) for k in keys)] for name, row in rows.items()]
    worst = [
        f"{key.removesuffix('_ms')} {min(d / o for o, d in found.values()):.2f}"
        for key in keys
        if (found := pairs(rows, key))
    ]
    text = table(("row", "input", "eager", "graph"), lines)
    return (
        f"{data['dtype']}, the least favourable row by mode: {', '.join(worst)} times as fast.\n\n"
        f"{text}{failures(data)}\n\n{about(data)}"
    )


def short() -> str:
    """What the README tells."""
    parts = [_short_gpu(), _short_cpu()]
    return "\n\n".join(filter(None, parts)) or MISSING


def _short_gpu() -> str:
    data = results("run-cuda-bf16")
    rows = good(data)
    if not rows:
        return ""
    lines = [
        [NAMES[mode], over_floor(rows, "diffusers", mode), over_floor(rows, "ours", mode)]
        for mode in GOALS
    ]
    models = good(results("denoisers-cuda-bf16"))
    if models:
        lines.append(["whole denoisers, times as fast", "1", speedup(pairs(models, "eager_ms"))])
    head = (f"{data['device']}, {len(rows)} calls of real models", "diffusers", "attnproc")
    return table(head, lines)


def _short_cpu() -> str:
    lines = []
    for dtype in ("fp32", "bf16"):
        data = results(f"run-cpu-{dtype}")
        found = pairs(good(data), "eager_ms")
        if found:
            head = f"{data['device']}, {data['threads']} threads, {dtype}, {len(found)} calls"
            lines.append([head, speedup(found)])
    return table(("on a CPU", "times as fast as diffusers"), lines) if lines else ""


def good(data: Data) -> dict[str, Any]:
    """The rows that passed their gate and were timed."""
    return {name: row for name, row in data.get("rows", {}).items() if "ours" in row}


def pairs(rows: Data, key: str) -> dict[str, tuple[float, float]]:
    """Ours and diffusers' of every row that has both."""
    return {
        name: (row["ours"][key], row["diffusers"][key])
        for name, row in rows.items()
        if key in row.get("ours", {}) and key in row.get("diffusers", {})
    }


def speedup(found: Mapping[str, tuple[float, float]]) -> str:
    """Geometric mean of how many times as fast ours is."""
    return _mean(theirs / ours for ours, theirs in found.values())


def over_floor(rows: Data, side: str, mode: str) -> str:
    """Geometric mean of a mode's time over the floor."""
    return _mean(
        row[side][f"{mode}_ms"] / row["floor"]["ms"]
        for row in rows.values()
        if f"{mode}_ms" in row.get(side, {}) and "floor" in row
    )


def over_calls(rows: Data, side: str, mode: str) -> str:
    """Geometric mean of a mode's time over what the floor's own calls take in that mode."""
    key = f"{mode}_ms"
    return _mean(
        row[side][key] / max(row["floor"]["ms"], row["floor"][key])
        for row in rows.values()
        if key in row.get(side, {}) and key in row.get("floor", {})
    )


def slower(rows: Data, mode: str) -> str:
    """The rows that ours loses by the medians, and how it is by the fastest batch of each side."""
    found = pairs(rows, f"{mode}_ms")
    if not found:
        return "not measured"
    least = pairs(rows, f"{mode}_min_ms")
    lost = [
        f"{name} ({theirs / ours:.2f}, by the fastest batch {_by_one(least.get(name))})"
        for name, (ours, theirs) in found.items()
        if ours > SPREAD * theirs
    ]
    return ", ".join(lost) or "none"


def _by_one(pair: tuple[float, float] | None) -> str:
    return f"{pair[1] / pair[0]:.2f}" if pair else "–"


def change(row: Data, key: str) -> str:
    """Diffusers' figure, ours, and how many times as good ours is."""
    ours, theirs = (row.get(side, {}).get(key) for side in ("ours", "diffusers"))
    times = f" ({theirs / ours:.2f})" if ours and theirs else ""
    return f"{number(theirs)} → {number(ours)}{times}"


def gain(row: Data, key: str) -> str:
    """How many times as fast ours is."""
    ours, theirs = (row.get(side, {}).get(key) for side in ("ours", "diffusers"))
    return f"{theirs / ours:.2f}" if ours and theirs else "–"


def ratio(row: Data, side: str, mode: str) -> str:
    """A mode's time over the floor."""
    time, floor = row.get(side, {}).get(f"{mode}_ms"), row.get("floor", {}).get("ms")
    return f"{time / floor:.2f}" if time and floor else "–"


def shape(row: Data) -> str:
    """The shapes of the input and of the text."""
    text = f", text {row['text']}" if row.get("text") else ""
    return f"{row.get('x')}{text}"


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "–"
    digits = max(0, 2 - math.floor(math.log10(value))) if value else 0
    return f"{value:.{min(digits, 4)}f}"


def failures(data: Data) -> str:
    """What could not be measured, and why."""
    lines = []
    for name, row in data["rows"].items():
        if "failed" in row:
            lines.append(f"- {name}: {row['failed']}")
        lines += [f"- {name}, {mode}: {why}" for mode, why in row.get("failures", {}).items()]
    return "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.geometric_mean(values):.2f}" if values else "–"


SECTIONS: dict[str, Callable[[], str]] = {
    "goals": gpu_summary,
    "rows": gpu_rows,
    "backward": gpu_backward,
    "replayed": gpu_replayed,
    "denoisers": denoisers,
    "bounds": bounds,
    "cpu-fp32": cpu("fp32"),
    "cpu-bf16": cpu("bf16"),
    "variants": variants,
    "two-gpus": two_gpus,
    "speed": short,
}


if __name__ == "__main__":
    typer.run(main)
