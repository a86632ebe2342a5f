"""The one straight line that every processor runs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.compiler import is_compiling

from .kernels import choose
from .kernels.around import grouped
from .parallel import beside, own_call, spread_out
from .prologue import arrange
from .prompts import with_prompts
from .shapes import merge_heads
from .types import Arranged, Call, Recipe, Scoring, Site

if TYPE_CHECKING:
    from .processor import Processor

__all__ = ["attend"]


def attend(recipe: Recipe, proc: Processor, attn: Any, call: Call) -> Tensor | tuple[Tensor, ...]:
    """Computes attention as the recipe says.

    Args:
        recipe: The parts.
        proc: The processor, which holds the weights of adapters.
        attn: The attention module, which holds projections, norms and settings.
        call: The arguments of this call.

    Returns:
        The image stream ``[B, S, C]`` (a grid where one came); with a text stream the pair
        (image, text); a third tensor where the family returns image prompts apart.

    Raises:
        ValueError: An argument has a shape or a combination that the recipe does not take.
    """
    spread = proc._parallel_config is not None  # pyright: ignore[reportPrivateUsage]
    at = Site(recipe, proc, attn, own_call(proc, call) if spread else call, is_compiling())

    x, context = call.x, call.context
    for enter in recipe.entering:
        x, context = enter(at, x, context)

    streams = recipe.project(at, x, context)
    del x, context
    arranged = arrange(at, streams)
    del streams

    kernel = choose(recipe.kernel, proc, at.compiling)
    extra, along = None, []
    for prompt in recipe.prompts:
        more = prompt(at, arranged, beside(at, kernel))
        if isinstance(more, list):
            along += more
        else:
            extra = more if extra is None or more is None else extra + more

    # On several ranks: from here to `home` all tokens of some heads, before and after own tokens.
    whole, home = at, None
    if spread:
        whole, arranged, kernel, home = spread_out(at, arranged, kernel)
    q, k, v = arranged.q, arranged.k, arranged.v
    for edit in recipe.edits:
        k, v = edit(whole, arranged, k, v)
    scoring = score(whole, arranged)
    # Large tensors go as soon as they are used up: this line sets the peak of memory.
    del arranged
    if k.shape[0] < q.shape[0]:
        kernel = partial(grouped, kernel)
    for wrapper in reversed(whole.recipe.around):
        kernel = partial(wrapper, kernel)
    if along:
        kernel = partial(with_prompts, along, kernel)
    o = kernel(q, k, v, scoring)  # [B, H, Q, D]
    del q, k, v
    # What wraps the kernel may hold on to its output.
    o = scoring.kept(o, at.keeps_nothing and not at.recipe.around)

    span = scoring.image
    if home is not None:
        o, span = home(o, span)
    o = merge_heads(o, at.keeps_nothing)
    image, text, *rest = recipe.output(at, o, span, extra)
    del o
    for leave in recipe.leaving:
        image, text = leave(at, image, text)
    return image if text is None else (image, text, *rest)


def score(at: Site, arranged: Arranged) -> Scoring:
    """The scoring of this call: settings of the module, then the mask."""
    text_first = at.recipe.text_first
    plain = Scoring(
        causal=at.setting("is_causal", False),
        scale=at.recipe.scale(at),
        upcast_qk=at.setting("upcast_attention", False),
        upcast_softmax=at.setting("upcast_softmax", False),
        image=arranged.image(text_first),
        image_keys=arranged.image_keys(text_first),
    )
    return at.recipe.mask(at, arranged, plain)
