"""What a mesh costs: bytes, times and memory by a few rates, to choose degrees before a run.

    python -m attnproc.parallel.cost --tokens 16384 --text 512 --gpus 64

The rates are those of measured runs (docs/parallel.md says of which, and how far off the times
are); give those of your own machine where it differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

__all__ = ["H100", "ONE", "Cost", "Layers", "Machine", "Split", "cost", "main", "splits"]

_HALF = 2  # bytes


@dataclass(frozen=True)
class Layers:
    """The transformer layers of a model, and what they are called with.

    Attributes:
        tokens: Of the image or video.
        text: Of the text, in joint attention.
        heads: Of queries.
        kv_heads: Of keys and values; 0 is as many.
        dim: Channels a head.
        layers: How many there are.
        batch: Rows, such as 2 under guidance.
        weights: Weights of all of a layer's linear layers that a token goes through, in units of
            the squared width: 12 for a transformer with a feed-forward of four times its width.
    """

    tokens: int
    text: int = 0
    heads: int = 24
    kv_heads: int = 0
    dim: int = 128
    layers: int = 57
    batch: int = 1
    weights: float = 12.0

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.dim

    @property
    def sequence(self) -> int:
        """Tokens of the joint sequence."""
        return self.tokens + self.text


@dataclass(frozen=True)
class Machine:
    """Rates of GPUs and links, as programs reach them.

    Attributes:
        linear: FLOP/s of linear layers with what runs beside them (norms, activations).
        attention: FLOP/s of attention.
        near: Bytes/s that a GPU sends to GPUs of its node.
        far: Bytes/s that it sends to those of other nodes.
        node: GPUs of a node.
        latency: Seconds that an exchange or a step of a ring takes at least, with the small
            kernels about it.
        hop: Seconds more for each step to another node.
        host: Seconds that Python takes to start a layer's kernels.
        host_exchange: Seconds more that it takes for one exchange.
        memory: Bytes/s of a GPU's memory, for merging the parts of a ring.
    """

    linear: float = 518e12
    attention: float = 663e12
    near: float = 240e9
    far: float = 45e9
    node: int = 8
    latency: float = 120e-6
    hop: float = 10e-6
    host: float = 2.2e-3
    host_exchange: float = 0.2e-3
    memory: float = 2.6e12


H100 = Machine()


@dataclass(frozen=True)
class Split:
    """Degrees of a mesh."""

    batch: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def gpus(self) -> int:
        """How many GPUs it takes."""
        return self.batch * self.ring * self.ulysses

    def __str__(self) -> str:
        return f"{self.batch} x {self.ring} x {self.ulysses}"


ONE = Split()


@dataclass(frozen=True)
class Cost:
    """One forward pass on each GPU.

    Attributes:
        split: The degrees.
        compute: Seconds of linear layers and attention.
        exchange: Seconds of communication that nothing hides.
        host: Seconds that Python takes; the pass takes no less.
        total: Seconds of the pass.
        sent: Bytes that a GPU sends.
        memory: Bytes of a layer's queries, keys, values and outputs.
    """

    split: Split
    compute: float
    exchange: float
    host: float
    total: float
    sent: float
    memory: float

    def __str__(self) -> str:
        return (
            f"{self.split!s:>14} {self.total * 1e3:9.1f} {self.compute * 1e3:9.1f} "
            f"{self.exchange * 1e3:9.1f} {self.host * 1e3:8.1f} {self.sent / 2**20:9.0f} "
            f"{self.memory / 2**20:8.0f}"
        )


def cost(model: Layers, split: Split = ONE, machine: Machine = H100) -> Cost:
    """The cost of a forward pass of a model whose blocks run on own tokens.

    Args:
        model: The layers.
        split: The degrees; ranks of one Ulysses group are neighbours, so they share a node first.
        machine: The rates.

    Raises:
        ValueError: A degree is less than 1, or there are more batch groups than rows.
    """
    _check(model, split)
    ranks = split.ring * split.ulysses
    rows = -(-model.batch // split.batch)
    own = rows * model.sequence / ranks
    kv_heads = model.kv_heads or model.heads
    # More ranks than heads compute some of them twice.
    busy = max(1.0, split.ulysses / model.heads)

    linear = 2 * model.weights * model.width**2 * own / machine.linear
    attended = 4 * own * model.sequence * model.width * busy / machine.attention
    there = (model.heads + 2 * max(kv_heads, min(split.ulysses, model.heads))) * model.dim
    exchanged = own * (there + model.width) * _HALF * (split.ulysses - 1) / split.ulysses
    exchange = _all_to_all(exchanged, split.ulysses, machine)

    held = 2 * own * split.ulysses * kv_heads * model.dim / split.ulysses * _HALF
    passed = held * (split.ring - 1)
    passing = merging = 0.0
    if split.ring > 1:
        nodes = split.gpus > machine.node
        passing = passed / (machine.far if nodes else machine.near)
        passing += (split.ring - 1) * nodes * machine.hop
        # Each part is read, the sum in float32 read and written.
        merging = split.ring * own * model.width * (_HALF + 2 * 4) / machine.memory
        merging += split.ring * machine.latency
    # Keys travel while those before them are at work.
    shown = max(0.0, passing - attended * (split.ring - 1) / split.ring)

    compute = model.layers * (linear + attended + merging)
    waits = model.layers * (exchange + shown)
    calls = 2 * (split.ulysses > 1) + split.ring * (split.ring > 1)
    host = model.layers * (machine.host + calls * machine.host_exchange)
    memory = own * (2 * model.width + 2 * kv_heads * model.dim) * _HALF * (1 + (split.ring > 1))
    total = max(compute + waits, host)
    sent = model.layers * (exchanged + passed)
    return Cost(split, compute, waits, host, total, sent, memory)


def splits(gpus: int, model: Layers, machine: Machine = H100) -> list[Cost]:
    """The costs of all meshes of so many GPUs, the fastest first."""
    found = [
        Split(batch, ring, gpus // batch // ring)
        for batch in _divisors(min(gpus, model.batch), gpus)
        for ring in _divisors(gpus // batch, gpus // batch)
    ]
    # Among equals the one with less to exchange.
    return sorted((cost(model, s, machine) for s in found), key=lambda c: (c.total, c.sent))


def _all_to_all(sent: float, ranks: int, machine: Machine) -> float:
    """Two of them, there and back; what leaves the node is the larger part on several nodes."""
    if ranks == 1:
        return 0.0
    outside = max(0.0, (ranks - machine.node) / (ranks - 1))
    time = sent * (1 - outside) / machine.near + sent * outside / machine.far
    nodes = -(-ranks // machine.node)
    return time + 2 * (machine.latency + (nodes - 1) * machine.hop)


def _divisors(most: int, of: int) -> list[int]:
    return [n for n in range(1, most + 1) if of % n == 0]


def _check(model: Layers, split: Split) -> None:
    for name in ("batch", "ring", "ulysses"):
        if getattr(split, name) < 1:
            raise ValueError(f"{name} is {getattr(split, name)}, possible are numbers from 1 on")
    if split.batch > model.batch:
        raise ValueError(f"batch is {split.batch}, the model has {model.batch} rows")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the meshes of some GPUs, the fastest first."""
    parser = argparse.ArgumentParser(
        prog="python -m attnproc.parallel.cost", description=(main.__doc__ or "")
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--show", type=int, default=8, help="how many meshes to print")
    for group, kind in (("model", Layers), ("machine", Machine)):
        box = parser.add_argument_group(group)
        for field in fields(kind):
            default = 16384 if field.name == "tokens" else field.default
            kind_of = float if isinstance(default, float) else int
            box.add_argument(f"--{field.name.replace('_', '-')}", type=kind_of, default=default)
    given = vars(parser.parse_args(arguments))
    model = Layers(**{f.name: given[f.name] for f in fields(Layers)})
    machine = Machine(**{f.name: given[f.name] for f in fields(Machine)})
    print("batch x ring x ulysses; milliseconds of a pass; MiB a GPU sends and holds")
    print("          mesh     total   compute  exchange     host      sent     held")
    print(cost(model, ONE, machine))
    for found in splits(given["gpus"], model, machine)[: given["show"]]:
        print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
