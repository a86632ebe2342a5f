"""One sequence, or one batch, over several GPUs: Ulysses, a ring, and both at once.

What the line calls stands here and does nothing on one process, not even import collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..types import Arranged, Call, KernelCall, Site

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..processor import Processor
    from .spread import Text

__all__ = ["beside", "own_call", "parallelize", "spread_out", "unparallelize"]

Span = tuple[int, int] | None
Home = Callable[[Tensor, Span], tuple[Tensor, Span]]
"""Brings a result ``[B, H, Q, D]`` back to the rank's tokens, and where the image stands in it."""


def parallelize(
    model: nn.Module, mesh: DeviceMesh, *, inside: bool = True, text: Text = "replicated"
) -> list[str]:
    """Spreads the attention of a model over the ranks of a mesh.

    Each attention module takes the rank's own tokens, projects them, attends to those of all
    ranks and gives back all tokens, so that the rest of the model need not know. Where the mesh
    has a dimension "batch", the model runs on the rank's own rows, such as one branch of
    guidance, and gives back all of them.

    Every rank calls the model with the same inputs. In training, gradients of a parameter are to
    be averaged over the ranks, as `DistributedDataParallel` does; they are then those of one
    process.

    Args:
        model: A model of diffusers or one of our modules; processors of diffusers are swapped.
        mesh: Its dimensions are named "batch", "ring", "ulysses", as far as they are there; one
            without a name is "ulysses".
        inside: Whether modules get all tokens. False is for models that get the rank's own ones
            already, as by a plan.
        text: With ``inside=False`` whether the text of joint attention is "split" like the image
            or "replicated" on each rank.

    Returns:
        The paths of the attention modules.

    Raises:
        ValueError: The mesh has no such dimension, there is no attention module of ours, or the
            model is spread over a mesh already.

    Sources: https://arxiv.org/abs/2309.14509 (Ulysses), https://arxiv.org/abs/2310.01889 (ring),
        https://arxiv.org/abs/2405.07719 (both)
    """
    from .whole import spread_model

    return spread_model(model, mesh, inside=inside, text=text)


def unparallelize(model: nn.Module) -> int:
    """Takes back what `parallelize` did; other parts of the processors stay.

    Returns:
        How many attention modules run on one process again.
    """
    from .whole import unspread_model

    return unspread_model(model)


def own_call(proc: Processor, call: Call) -> Call:
    """The call with the parts of position tables and picture masks that belong to own tokens."""
    if proc._parallel_config is None:  # pyright: ignore[reportPrivateUsage]
        return call
    from .line import own_call as run

    return run(proc, call)


def beside(at: Site, kernel: KernelCall) -> KernelCall:
    """The kernel for image prompts, whose queries are the rank's own."""
    if at.proc._parallel_config is None:  # pyright: ignore[reportPrivateUsage]
        return kernel
    from .line import beside as run

    return run(at, kernel)


def spread_out(
    at: Site, arranged: Arranged, kernel: KernelCall
) -> tuple[Site, Arranged, KernelCall, Home]:
    """What the line works on from here, and the way back of its result.

    Raises:
        Disagree: The ranks call with different shapes or settings.
        Lost: Another rank ended, or did not answer in time.
    """
    if at.proc._parallel_config is None:  # pyright: ignore[reportPrivateUsage]
        return at, arranged, kernel, stay
    from .line import spread_out as run

    return run(at, arranged, kernel)


def stay(o: Tensor, span: Span) -> tuple[Tensor, Span]:
    """The way back of one process."""
    return o, span
