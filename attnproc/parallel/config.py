"""Which ranks attention is spread over, by a mesh of ours or a configuration of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .exchange import ALONE, Axis
from .spread import Spread, Text

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..processor import Processor

__all__ = ["AXES", "spread_of", "spread_over"]

AXES = ("batch", "ring", "ulysses")
"""Names of a mesh's dimensions, in their order."""

_KNOWN = "_attnproc_spread"


def spread_of(proc: Processor) -> Spread | None:
    """What is set on a processor, by `parallelize` or by diffusers' `enable_parallelism`."""
    config: Any = proc._parallel_config  # pyright: ignore[reportPrivateUsage]
    if config is None or isinstance(config, Spread):
        return config
    inner = getattr(config, "context_parallel_config", config)
    if inner is None:
        return None
    found = inner.__dict__.get(_KNOWN)
    if found is None:
        found = inner.__dict__[_KNOWN] = _of_diffusers(inner)
    return found


def spread_over(mesh: DeviceMesh, text: Text = "replicated", **options: Any) -> Spread:
    """The axes of a mesh.

    Args:
        mesh: Its dimensions are named "batch", "ring" and "ulysses", as far as they are there and
            in this order; a mesh of one dimension without a name is "ulysses". Other dimensions
            are left to others.
        text: Whether the text of joint attention comes whole to each rank, or split.
        options: Further attributes of `Spread`.

    Raises:
        ValueError: The mesh has none of these dimensions, or they stand in another order.
    """
    names = mesh.mesh_dim_names
    if names is None:
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh has {mesh.ndim} dimensions without names, name them of {', '.join(AXES)}"
            )
        axis = Axis.of(mesh)
        return Spread(axis, ALONE, axis, ALONE, axis, text=text, **options)
    ours = tuple(name for name in names if name in AXES)
    if not ours or ours != tuple(name for name in AXES if name in names):
        raise ValueError(
            f"mesh has the dimensions {names}, it needs one or more of {', '.join(AXES)} in "
            "this order"
        )
    axes = {name: Axis.of(mesh[name]) if name in ours else ALONE for name in AXES}
    tokens = _both(mesh, [name for name in ours if name != "batch"])
    return Spread(
        axes["ulysses"], axes["ring"], tokens, axes["batch"], _both(mesh, ours), text=text,
        **options,
    )  # fmt: skip


def _both(mesh: DeviceMesh, names: Sequence[str]) -> Axis:
    """Some dimensions of a mesh as one."""
    wide = [name for name in names if mesh[name].size() > 1]
    if not wide:
        return ALONE
    return Axis.of(mesh[wide[0]] if len(wide) == 1 else mesh[tuple(wide)]._flatten())  # pyright: ignore[reportPrivateUsage]


def _of_diffusers(config: Any) -> Spread:
    """The axes of a `ContextParallelConfig` that diffusers has set up."""
    return Spread(
        ulysses=Axis.of(config._ulysses_mesh),
        ring=Axis.of(config._ring_mesh),
        tokens=(tokens := Axis.of(config._flattened_mesh)),
        everyone=tokens,
        uneven=config.ulysses_anything or config.ring_anything,
        wide=config.convert_to_fp32,
    )
