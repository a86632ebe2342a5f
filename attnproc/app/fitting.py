"""Which processors the demo model can run on, read off their recipes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from attnproc.app.faults import Fault

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from attnproc.kernels import Kernel
    from attnproc.processor import Processor
    from attnproc.types import Recipe

__all__ = ["find", "install", "make", "why_not"]


def find(name: str) -> type[Processor]:
    """The processor class of a name, if a U-Net can run on it here.

    Raises:
        Fault: There is none of that name, it is for another kind of model, or its kernel is
            missing.
    """
    from attnproc import presets

    spelled = {known.lower(): known for known in presets.__all__}
    if name.lower() not in spelled:
        raise Fault(f"there is no processor {name!r}; {_near(name, presets.__all__)}")
    kind: type[Processor] = getattr(presets, spelled[name.lower()])
    reason = why_not(kind.recipe)
    if reason:
        raise Fault(f"{kind.__name__} can't run this model: {reason}")
    return kind


def why_not(recipe: Recipe) -> str | None:
    """Why a trained U-Net's self and cross attention can't run on a recipe; None if it can."""
    from attnproc.frame import ContextNorm
    from attnproc.kernels.around import Perturbed
    from attnproc.layouts import packed, separate
    from attnproc.linears import module_linear
    from attnproc.outputs import to_out

    if recipe.project not in (separate, packed):
        return f"its projections are {_name(recipe.project)!r}, a U-Net's are 'separate'"
    if recipe.output is not to_out:
        return f"its output is {_name(recipe.output)!r}, a U-Net's is 'to_out'"
    if recipe.kernel.linear:
        return "its attention is linear, the model was trained with softmax attention"
    if recipe.rotary is not None:
        return "it rotates queries and keys by a table of positions, which a U-Net doesn't have"
    if ContextNorm() not in recipe.frame:
        return "it has no norm of the context, so it is for self attention alone"
    if any(isinstance(part, Perturbed) for part in recipe.around):
        return "it perturbs a part of the batch, in self attention alone"
    if recipe.prompts:
        return "it needs an image prompt and trained weights for it"
    if recipe.linears != (module_linear,):
        return "it needs trained projections of its own"
    return _kernel_missing(recipe.kernel)


def make(kind: Callable[..., Any], *, guidance: float) -> Any:
    """A processor with settings that suit one run; also of a class of diffusers."""
    settings = {"slice_size": 2, "batch_size": 2 if guidance > 1 else 1}
    takes = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in settings.items() if name in takes})


def install(unet: UNet2DConditionModel, name: str | None, *, guidance: float) -> str:
    """Puts our processors on a model: those of its own processors' names, or `name` everywhere.

    Returns:
        What runs where, in words.

    Raises:
        Fault: `name` can't run the model.
    """
    import attnproc

    if name is None:
        report = attnproc.swap(unet)
        if report.kept:
            raise Fault(f"not on attnproc: {next(iter(report.kept.values()))}")
        return str(report).replace("\n", ", ")
    kind = find(name)
    fuse(unet, kind.recipe)
    unet.set_attn_processor(make(kind, guidance=guidance))
    return f"{len(unet.attn_processors)} x {kind.__name__}"


def fuse(unet: UNet2DConditionModel, recipe: Recipe) -> None:
    """Packs the model's projections where the recipe can use it."""
    from attnproc.interop import processors
    from attnproc.layouts import packed

    if recipe.project is packed:
        for _, attn in processors(unet):
            layer: Any = attn
            layer.fuse_projections()


def _near(name: str, known: Sequence[str]) -> str:
    """Names like `name`, with and without their common ending."""
    spelled = {full.lower(): full for full in known}
    spelled |= {_stem(full.lower()): full for full in known}
    found = [spelled[near] for near in difflib.get_close_matches(name.lower(), spelled, n=4)]
    found += [full for full in known if _stem(name.lower()) in full.lower()]
    near = list(dict.fromkeys(found))[:4]
    return f"near it: {', '.join(near)}" if near else "see `attnproc list`"


def _stem(name: str) -> str:
    return name.partition("attn")[0] or name


def _kernel_missing(kernel: Kernel) -> str | None:
    import torch

    from attnproc.types import Scoring

    q = torch.zeros(1, 1, 8, 8)
    try:
        kernel(q, q, q, Scoring())
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def _name(part: Any) -> str:
    return getattr(part, "__name__", str(part))
