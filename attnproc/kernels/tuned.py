"""The table of what was fastest on this machine, by kind of call.

It is a JSON file: devices by name, and in each the kernel of a kind of call. `autotune` writes it,
the automatic choice reads it once. The file is ``$ATTNPROC_TUNED``, else
``attnproc/kernels.json`` in the user's folder of caches.

Code under `torch.compile` looks into the table while it is traced, and keeps what it found.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from ..tracing import constant
from .base import Kernel, named
from .takes import Ask, why_not

__all__ = ["default_path", "device_name", "is_tuned", "key_of", "store", "tuned", "use_table"]

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
    """Reads another table from now on; None is no table. Compiled code keeps its choices."""
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


def is_tuned(x: Tensor) -> bool:
    """Whether the table has anything for the hardware that a tensor is on."""
    # Making the name of a device takes as long as a launch, and most have no table.
    return _is_written() and _serves(x.device.type)


@constant
def _is_written() -> bool:
    return bool(table())


@constant
def _serves(device: str) -> bool:
    """Whether the table has anything for this hardware."""
    return device_name(device) in table()


def tuned(asked: Ask) -> Kernel | None:
    """The kernel that `autotune` found for this kind of call, if it still takes it."""
    if asked.lse or not _serves(asked.device):
        return None
    name = _traced(asked) if asked.compiling else _entries(asked.device).get(key_of(asked))
    if name is None or not _is_known(name):
        return None
    kernel = named(name)
    return None if why_not(kernel.takes, asked) else kernel


def _traced(asked: Ask) -> str | None:
    """The entry by comparing sizes: those of compiled code may be symbols, which make no key."""
    sizes = _sizes(asked)
    for others, name in _alike(asked.device, _form(asked)):
        if len(sizes) == len(others) and all(a == b for a, b in zip(sizes, others, strict=True)):
            return name
    return None


def _entries(device: str) -> dict[str, str]:
    return table()[device_name(device)]


@constant
def _alike(device: str, form: str) -> tuple[tuple[tuple[int | None, ...], str], ...]:
    """The sizes and kernels of the entries of one form."""
    split = [(*key.partition(" | "), name) for key, name in _entries(device).items()]
    return tuple((_read(sizes), name) for sizes, _, other, name in split if other == form)


@constant
def _is_known(name: str) -> bool:
    """Whether the kernel is still here; its package may be gone."""
    try:
        return bool(named(name))
    except ValueError:
        return False


def key_of(asked: Ask) -> str:
    """A kind of call in one line, as the table writes it."""
    b, h, g, q, k, d, e, *window = _sizes(asked)
    reach = f" window {window[0]},{window[1]}" if window else ""
    return f"{b}x{h}/{g} {q}x{k} {d}/{e}{reach} | {_form(asked)}"


def _read(sizes: str) -> tuple[int | None, ...]:
    return tuple(None if n == "None" else int(n) for n in re.findall(r"\d+|None", sizes))


def _sizes(asked: Ask) -> tuple[int | None, ...]:
    """Batch, heads, heads of keys, queries, keys, channels, those of values, and a window's."""
    return (*asked[2:9], *(asked.window or ()))


def _form(asked: Ask) -> str:
    """What a kind of call has beside its sizes."""
    masks = "&".join(sorted(asked.kinds)) or "no mask"
    mods = f" {','.join(asked.mods)}" if asked.mods else ""
    dtype = str(asked.dtype).removeprefix("torch.")
    return f"{dtype} {masks}{mods}{' backward' if asked.backward else ''}"


def device_name(device: str) -> str:
    """The name of the hardware, so that a table does not serve another one."""
    return torch.cuda.get_device_name() if device == "cuda" else device
