"""The table of what was fastest on this machine, by kind of call.

It is a JSON file: devices by name, and in each the kernel of a kind of call. `autotune` writes it,
the automatic choice reads it once. The file is ``$ATTNPROC_TUNED``, else
``attnproc/kernels.json`` in the user's folder of caches.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from .base import Kernel, named
from .takes import Ask, why_not

__all__ = ["default_path", "device_name", "key_of", "store", "table", "tuned", "use_table"]

_table: dict[str, dict[str, str]] | None = None


def default_path() -> Path:
    """Where the table is kept."""
    given = os.environ.get("ATTNPROC_TUNED")
    if given is not None:
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "attnproc" / "kernels.json"


def table() -> dict[str, dict[str, str]]:
    """The table, read when it is first asked for; empty where there is none."""
    global _table
    found = _table
    if found is None:
        path = default_path()
        found = _table = json.loads(path.read_text()) if path.is_file() else {}
    return found


def use_table(path: str | Path | None) -> None:
    """Reads another table from now on; None is no table."""
    global _table
    _table = {} if path is None else json.loads(Path(path).read_text())


def store(found: dict[str, str], device: str, path: str | Path | None = None) -> Path:
    """Adds entries to the table and its file.

    Returns:
        The file.
    """
    global _table
    path = default_path() if path is None else Path(path)
    whole = json.loads(path.read_text()) if path.is_file() else {}
    whole[device] = {**whole.get(device, {}), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    _table = whole
    return path


def tuned(asked: Ask) -> Kernel | None:
    """The kernel that `autotune` found for this kind of call, if it still takes it."""
    entries = table().get(device_name(asked.device))
    name = None if not entries or asked.lse else entries.get(key_of(asked))
    if name is None:
        return None
    try:
        kernel = named(name)
    except ValueError:
        return None
    return None if why_not(kernel.takes, asked) else kernel


def key_of(asked: Ask) -> str:
    """A kind of call in one line, as the table writes it."""
    dtype = str(asked.dtype).removeprefix("torch.")
    masks = "&".join(sorted(asked.kinds)) or "no mask"
    return (
        f"{dtype} {asked.batch}x{asked.heads}/{asked.kv_heads} {asked.queries}x{asked.keys} "
        f"{asked.dim}/{asked.v_dim} {masks}{' backward' if asked.backward else ''}"
    )


def device_name(device: str) -> str:
    """The name of the hardware, so that a table does not serve another one."""
    return torch.cuda.get_device_name() if device == "cuda" else device
