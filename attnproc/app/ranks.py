"""Several processes, as `torchrun` starts them, which make one picture together."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from attnproc.app.faults import Fault

if TYPE_CHECKING:
    from torch import nn

__all__ = ["first", "joined", "named", "own_device", "spread"]

# Loading may take one rank much longer than another; a step does not.
_TIMEOUT = timedelta(minutes=5)


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process is the one that writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def named(line: str) -> str:
    """A line with the process that says it, where there are several."""
    return line if count() == 1 else f"rank {os.environ.get('RANK', '0')}: {line}"


def own_device(device: str) -> str:
    """The process's own GPU where any will do."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None and count() > 1 else device


@contextmanager
def joined(device: str) -> Generator[None]:
    """The processes can reach each other while the block runs.

    Raises:
        Fault: They can't, for the reason given.
    """
    if count() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    own = torch.device(own_device(device))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    try:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise Fault(f"{count()} processes can't reach each other: {error}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def spread(unet: nn.Module, rows: int) -> str:
    """Spreads a model over the processes: rows of its batch first, then tokens.

    Args:
        unet: The model.
        rows: How many rows the batch has.

    Returns:
        Over how many, in words; nothing for one.
    """
    ranks = count()
    if ranks == 1:
        return ""
    from torch.distributed.device_mesh import init_device_mesh

    import attnproc

    # As many groups as share out the rows evenly.
    groups = max(n for n in range(1, ranks + 1) if ranks % n == 0 and rows % n == 0)
    device = next(unet.parameters()).device.type
    mesh = init_device_mesh(device, (groups, ranks // groups), mesh_dim_names=("batch", "ulysses"))
    attnproc.parallelize(unet, mesh)
    return f" on {ranks} processes"
