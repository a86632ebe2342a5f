"""Maps in files: npz for NumPy, safetensors for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..places import Box
from .maps import Maps

__all__ = ["load", "save"]

_SETTINGS = ("slab", "part", "each_step", "heads", "aspect")


def save(maps: Maps, path: Path) -> None:
    """Writes maps to a ``.npz`` or ``.safetensors`` file.

    The arrays are called ``layer`` or, with steps kept apart, ``layer@0``, ``layer@1``, …; what
    they mean is JSON under ``meta``.

    Raises:
        ValueError: The name ends in something else.
    """
    arrays = {
        f"{layer}@{i}" if maps.each_step else layer: found.contiguous().cpu()
        for layer, kept in maps.taken.items()
        for i, found in enumerate(kept)
    }
    meta = json.dumps(_described(maps))
    if path.suffix == ".npz":
        import numpy as np

        named: dict[str, Any] = {"meta": meta, **{k: t.numpy() for k, t in arrays.items()}}
        np.savez_compressed(path, **named)
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(arrays, path, metadata={"meta": meta})
    else:
        raise ValueError(f"path is {path}: give a name that ends in .npz or .safetensors")


def load(path: str | Path) -> Maps:
    """The maps of a file that `Maps.save` wrote."""
    arrays, meta = _read(Path(path))
    maps = Maps(
        _labels(meta["words"]),
        tuple(meta["part"]),
        regions=_labels(meta["regions"]),
        slab=meta["slab"],
        each_step=meta["each_step"],
        heads=meta["heads"],
        aspect=meta["aspect"],
    )
    for name, found in arrays.items():
        layer = name.rpartition("@")[0] if maps.each_step else name
        maps.taken.setdefault(layer, []).append(found)
    maps.calls = dict(meta["calls"])
    return maps


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
            return {k: torch.from_numpy(file[k]) for k in meta["arrays"]}, meta
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return {k: file.get_tensor(k) for k in meta["arrays"]}, meta


def _described(maps: Maps) -> dict[str, Any]:
    names = [
        f"{layer}@{i}" if maps.each_step else layer
        for layer, kept in maps.taken.items()
        for i in range(len(kept))
    ]
    return {
        **{name: getattr(maps, name) for name in _SETTINGS},
        "words": _plain(maps.keys),
        "regions": _plain(maps.regions),
        "calls": maps.calls,
        "arrays": names,
    }


def _plain(labels: dict[str, list[int] | Box] | None) -> Any:
    if labels is None:
        return None
    return {k: {"box": vars(at)} if isinstance(at, Box) else at for k, at in labels.items()}


def _labels(labels: dict[str, Any] | None) -> dict[str, Any] | None:
    if labels is None:
        return None
    return {k: Box(**at["box"]) if isinstance(at, dict) else at for k, at in labels.items()}
