"""The line over several ranks: what `engine.attend` calls between its steps.

Up to the kernel a rank works on its own tokens. Then tokens are exchanged for heads, so that
edits, masks, wrappers and any kernel see the sequence that one process would see, for some of its
heads (Ulysses, https://arxiv.org/abs/2309.14509). A ring, image prompts, cross attention and
linear attention need less.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..edits import FirstFrame
from ..frame import ChannelsFirst, GridIn
from ..kernels.around import Perturbed, Sliced, identity
from ..kernels.base import Kernel
from ..prompts import region
from ..rotary import per_head
from ..types import Arranged, Call, KernelCall, Recipe, Scoring, Site
from . import Home, Span, stay
from .check import agree, lengths
from .config import spread_of
from .exchange import Axis, gather, shares, spans
from .linear import Reduced
from .maps import of_all_heads
from .ring import Ring, local_of
from .scorings import gathered_keys, gathered_rows, of_heads, over_keys
from .spread import Room, Sequences, Spread, heads_of, to_heads, to_tokens
from .ulysses import Exchanged, parts_of

if TYPE_CHECKING:
    from ..processor import Processor

__all__ = ["beside", "own_call", "spread_out", "takes_own", "tokens_of"]


def own_call(proc: Processor, call: Call) -> Call:
    """The call with the parts of position tables and picture masks that belong to own tokens."""
    spread, rotary = spread_of(proc), proc.recipe.rotary
    if spread is None or spread.tokens.size == 1:
        return call
    if not spread.inside:
        return call if call.ip_masks is None else call.but(ip_masks=_masks(proc, call, spread))
    if not takes_own(spread, proc.recipe, call):
        return call
    if call.ip_masks is not None:
        call = call.but(ip_masks=_masks(proc, call, spread))
    if rotary is None:
        return call
    at = spans(shares(tokens_of(proc.recipe, call.x), spread.tokens.size))[spread.tokens.rank]
    text = call.context.shape[1] if rotary.over == "joint" and call.context is not None else 0
    axis = -3 if rotary.form is per_head else -2
    cross = call.context is not None and call.context is not call.x
    of_keys = call.key_rope if cross else _own_table(call.key_rope, at, axis, 0)
    return call.but(rope=_own_table(call.rope, at, axis, text), key_rope=of_keys)


def takes_own(spread: Spread, recipe: Recipe, call: Call) -> bool:
    """Whether a module takes its own of all tokens, before it projects them.

    It does not where the projections work on a grid, or where a rank would have no token.
    """
    if not spread.inside or spread.tokens.size == 1:
        return False
    into_tokens = any(isinstance(step, GridIn | ChannelsFirst) for step in recipe.frame)
    grid = call.x.ndim != 3 and not into_tokens
    return not grid and tokens_of(recipe, call.x) >= spread.tokens.size


def tokens_of(recipe: Recipe, x: Tensor) -> int:
    """Tokens of ``[B, S, C]`` or of a grid ``[B, C, height, width]``."""
    first = any(isinstance(step, ChannelsFirst) for step in recipe.frame)
    return math.prod(x.shape[2:]) if first or x.ndim > 3 else x.shape[1]


def spread_out(
    at: Site, arranged: Arranged, kernel: KernelCall
) -> tuple[Site, Arranged, KernelCall, Home]:
    """What the rest of the line works on, and the way back.

    On one process everything stays as it is.

    Raises:
        Disagree: The ranks call with different shapes or settings.
        Lost: Another rank ended, or did not answer in time.
    """
    spread = spread_of(at.proc)
    if spread is None or spread.everyone.size == 1:
        return at, arranged, kernel, stay
    if spread.tokens.size == 1 and (spread.running.rows is None or not _mixes_rows(at.recipe)):
        return at, arranged, kernel, stay
    _check(at, arranged, kernel, spread)
    arranged, hidden = _text_shown(at, arranged, spread)
    work = _Work(at, arranged, kernel, _places(at, arranged, spread)._replace(hidden=hidden))
    for way in (_over_keys_alone, _linear, _order_free):
        found = way(work)
        if found is not None:
            return found
    return _for_heads(work)


def beside(at: Site, kernel: KernelCall) -> KernelCall:
    """The kernel for image prompts: own queries look at a prompt that every rank has.

    Keys of the image that stand before those of a prompt are own ones; then it is the kernel of
    all ranks.
    """
    spread = spread_of(at.proc)
    return kernel if spread is None or spread.tokens.size == 1 else partial(_beside, at, kernel)


def _beside(
    at: Site, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
) -> Tensor:
    if scoring.image_keys is None:
        return kernel(q, k, v, scoring)
    recipe = at.recipe.but(around=(), edits=(), text_first=False)
    site = at.but(recipe=recipe, call=at.call.but(mask=None))
    prompt = k.shape[2] - scoring.image_keys[1]
    _, arranged, kernel, home = spread_out(site, Arranged(q, k, v, q.shape[2], prompt), kernel)
    o = kernel(arranged.q, arranged.k, arranged.v, scoring.but(image_keys=None))
    return home(o, None)[0]


class _Places(NamedTuple):
    """Which tokens each rank has."""

    spread: Spread
    of_q: Sequences
    of_k: Sequences
    cross: bool
    """Whether every rank has all keys."""
    text_whole: bool
    """Whether every rank has all of the text."""
    image_whole: bool
    """Whether every rank has all of the image, as of a grid."""
    rows: tuple[int, ...] | None
    """Rows of the batch of each rank, where they have to meet."""
    hidden: bool = False
    """Whether the text is joined to the image already, so that the call knows no text."""


class _Work(NamedTuple):
    """A call and its places."""

    at: Site
    arranged: Arranged
    kernel: KernelCall
    places: _Places

    @property
    def plain(self) -> bool:
        """Whether nothing but a kernel looks at the call."""
        recipe, attn = self.at.recipe, self.at.attn
        wrapped = any(not isinstance(part, Sliced) for part in recipe.around)
        return not wrapped and not getattr(attn, "is_causal", False)


def _places(at: Site, arranged: Arranged, spread: Spread) -> _Places:
    call, axis = at.call, spread.tokens
    text_q = arranged.q.shape[2] - arranged.length
    text_k, image_k = arranged.text_keys, arranged.k.shape[2] - arranged.text_keys
    other = call.context is not None and call.context is not call.x
    cross = image_k == 0 or (text_k == 0 and other)
    image_whole = spread.inside and axis.size > 1 and not takes_own(spread, at.recipe, call)
    text_whole = spread.inside or spread.text == "replicated" or text_q == 0

    if spread.inside:
        image, text = shares(tokens_of(at.recipe, call.x), axis.size), shares(text_k, axis.size)
    elif spread.uneven:
        image, text = lengths(axis, arranged.length, text_k, device=arranged.q.device)
    else:
        image, text = (arranged.length,) * axis.size, (text_k,) * axis.size
    if text_whole or cross:
        text = shares(text_k, axis.size)
    first, none = at.recipe.text_first, (0,) * axis.size
    of_q = Sequences(text if text_q else none, image, first)
    # In cross attention each rank hands over a part of what all of them have.
    of_k = Sequences(text, shares(image_k, axis.size) if cross else image, first)
    rows = spread.running.rows if _mixes_rows(at.recipe) else None
    return _Places(spread, of_q, of_k, cross, text_whole, image_whole, rows)


def _text_shown(at: Site, arranged: Arranged, spread: Spread) -> tuple[Arranged, bool]:
    """The call with the text that blocks like Flux' single ones have joined to the image."""
    rotary, running = at.recipe.rotary, spread.running
    if spread.inside or rotary is None or rotary.over != "joint":
        return arranged, False
    if at.call.context is not None:
        running.text = arranged.text_keys
        return arranged, False
    text = running.text or 0
    hidden = 0 < text < arranged.length
    if hidden:
        arranged = arranged.but(length=arranged.length - text, text_keys=text)
    return arranged, hidden


def _mixes_rows(recipe: Recipe) -> bool:
    """Whether a part looks at several rows of the batch, or counts them."""
    wrapped = any(not isinstance(part, Sliced) for part in recipe.around)
    return wrapped or any(isinstance(e, FirstFrame) or hasattr(e, "part") for e in recipe.edits)


Way = tuple[Site, Arranged, KernelCall, Home]


def _over_keys_alone(work: _Work) -> Way | None:
    """Cross attention: own queries look at keys that every rank has."""
    places = work.places
    if not places.cross or places.rows or not work.plain or not over_keys(work.at.call.mask):
        return None
    return work.at, work.arranged, work.kernel, stay


def _linear(work: _Work) -> Way | None:
    """Linear attention: sums over own keys are added up, which are small."""
    at, arranged, kernel, places = work
    axis = places.spread.tokens
    local = all(isinstance(p, Perturbed) and p.perturb is identity for p in at.recipe.around)
    if not kernel_of(kernel).linear or not local or places.rows or places.cross:
        return None
    if at.call.mask is not None or arranged.text_keys:
        return None
    if not places.image_whole:
        return at, arranged, Reduced(axis), stay
    whole = arranged.q, arranged.k, arranged.v
    q, k, v = (_own_of_image(t, places.of_q, axis.rank) for t in whole)
    arranged = arranged.but(q=q, k=k, v=v, length=q.shape[2])
    return at, arranged, Reduced(axis), partial(_all_of_image, places)


def _all_of_image(places: _Places, o: Tensor, span: Span) -> tuple[Tensor, Span]:
    return gather(o, places.of_q.image, 2, places.spread.tokens), span


def _order_free(work: _Work) -> Way | None:
    """Calls that nothing but the kernel looks at: it may see the tokens in any order.

    Over a ring by a kernel whose parts can be merged, over the others by an exchange.
    """
    at, arranged, kernel, places = work
    spread, bare = places.spread, kernel_of(kernel)
    free = not (at.recipe.around or at.recipe.edits or places.rows or places.cross)
    if not free or not work.plain or at.call.mask is not None or bare.linear:
        return None
    size, axis, ranks = spread.ulysses.size, spread.tokens, range(spread.tokens.size)
    if spread.ring.size > 1:
        blocks = [range(i, i + size) for i in range(0, spread.tokens.size, size)]
        local = local_of(bare, arranged.q, arranged.v)
        # The keys of all ranks travel in messages of one size.
        if local is not None and len({sum(map(places.of_k.length, b)) for b in blocks}) == 1:
            axis, ranks = spread.ulysses, blocks[spread.ring.rank]
            kernel = Ring(spread.ring, local, spread.wide)
    q, k, v = _own(work)
    if axis.size > 1:
        heads = tuple(heads_of(q.shape[1], k.shape[1], axis.size))
        queries, keys = (tuple(of.length(i) for i in ranks) for of in (places.of_q, places.of_k))
        kernel = Exchanged(axis, parts_of(heads, sum(keys)), queries, keys, kernel)
    me = spread.tokens.rank
    length, text = places.of_q.image[me], places.of_k.text[me]
    if places.hidden:
        length, text = q.shape[2], 0
    return _whole(work), Arranged(q, k, v, length, text), kernel, partial(_home, places)


def _for_heads(work: _Work) -> Way:
    """Tokens for heads, over all ranks."""
    at, places = work.at, work.places
    spread = places.spread
    axis = spread.everyone if places.rows else spread.tokens
    arranged, room = _exchanged(work, axis)
    mask = at.call.mask
    if not (spread.inside or places.cross):
        mask = gathered_keys(mask, places.of_k, spread.tokens)
    if places.rows:
        mask = gathered_rows(mask, places.rows, spread.batch)
    batch, around = arranged.q.shape[0], list[Any](at.recipe.around)
    batches = [batch, *(part.plain(batch) for part in around if hasattr(part, "plain"))]
    mine, total = room.heads[axis.rank], work.arranged.q.shape[1]
    whole = _whole(work)
    call = whole.call.but(mask=of_heads(mask, mine.queries, total, batches))
    whole = whole.but(call=call, recipe=of_all_heads(whole.recipe, room))
    return whole, arranged, work.kernel, partial(_exchanged_home, places, room)


def _exchanged(work: _Work, axis: Axis) -> tuple[Arranged, Room]:
    """The tokens of all ranks, for own heads."""
    places = work.places
    q, k, v = _own(work)
    rows = places.rows or (q.shape[0],)
    room = Room(axis, rows, tuple(heads_of(q.shape[1], k.shape[1], axis.size)))
    q, k, v = to_heads(room, q, k, v, places.of_q, places.of_k)
    found = Arranged(q, k, v, sum(places.of_q.image), sum(places.of_k.text))
    if places.hidden:
        found = found.but(length=q.shape[2], text_keys=0)
    return found, room


def _own(work: _Work) -> tuple[Tensor, Tensor, Tensor]:
    """Own queries, keys and values of what came, of which a rank may have more."""
    places, arranged = work.places, work.arranged
    q, k, v = arranged.q, arranged.k, arranged.v
    rank = places.spread.tokens.rank
    if places.text_whole or places.cross:
        q = _own_of_text(q, arranged.length, places.of_q, rank)
        image_k = k.shape[2] - arranged.text_keys
        k, v = (_own_of_text(t, image_k, places.of_k, rank) for t in (k, v))
    if places.image_whole:
        q = _own_of_image(q, places.of_q, rank)
    if places.image_whole or places.cross:
        k, v = (_own_of_image(t, places.of_k, rank) for t in (k, v))
    return q, k, v


def _exchanged_home(places: _Places, room: Room, o: Tensor, span: Span) -> tuple[Tensor, Span]:
    """Own tokens of all heads; see `_home`."""
    return _home(places, to_tokens(room, o, places.of_q), span)


def _home(places: _Places, o: Tensor, span: Span) -> tuple[Tensor, Span]:
    """What the module has to give of own tokens, and where their image stands."""
    of_q, axis = places.of_q, places.spread.tokens
    text, image, first = of_q.text[axis.rank], of_q.image[axis.rank], of_q.text_first
    if not any(of_q.text):
        return (gather(o, of_q.image, 2, axis) if places.image_whole else o), None
    streams = o.split((text, image) if first else (image, text), dim=2)
    of_text, of_image = streams if first else streams[::-1]
    if places.text_whole:
        of_text = gather(of_text, of_q.text, 2, axis)
    if places.image_whole:
        of_image = gather(of_image, of_q.image, 2, axis)
    if places.text_whole or places.image_whole:
        text, image = of_text.shape[2], of_image.shape[2]
        o = _cat(of_text, of_image, first)
    if places.hidden:
        return o, None
    return o, (text, text + image) if first else (0, image)


def _own_of_text(t: Tensor, image: int, tokens: Sequences, rank: int) -> Tensor:
    """``[B, H, S, D]`` with own tokens of a text that every rank has."""
    text = t.shape[2] - image
    if not text:
        return t
    at = spans(tokens.text)[rank]
    if tokens.text_first:
        return _cat(t[:, :, at], t[:, :, text:], True)
    return _cat(t[:, :, image + at.start : image + at.stop], t[:, :, :image], False)


def _own_of_image(t: Tensor, tokens: Sequences, rank: int) -> Tensor:
    """Own tokens of an image that every rank has; the text's are own ones already."""
    at, text = spans(tokens.image)[rank], tokens.text[rank]
    if not text:
        return t[:, :, at]
    if tokens.text_first:
        return _cat(t[:, :, :text], t[:, :, text + at.start : text + at.stop], True)
    image = t.shape[2] - text
    return _cat(t[:, :, image:], t[:, :, at], False)


def _cat(text: Tensor, image: Tensor, text_first: bool) -> Tensor:
    return torch.cat((text, image) if text_first else (image, text), dim=2)


def _whole(work: _Work) -> Site:
    """The site with an input as long as that of one process, for what asks for lengths."""
    at, x, places = work.at, work.at.call.x, work.places
    if places.spread.inside or x.ndim != 3:
        return at
    x = x[:, :1].expand(-1, sum(places.of_q.image), -1)
    return at.but(call=at.call.but(x=x))


def kernel_of(call: Any) -> Kernel:
    """The kernel within checks and guards."""
    while not isinstance(call, Kernel):
        call = next(arg for arg in call.args if isinstance(arg, Kernel | partial))
    return call


def _check(at: Site, arranged: Arranged, kernel: KernelCall, spread: Spread) -> None:
    q, k = arranged.q, arranged.k
    facts: dict[str, Any] = {
        "degree": (spread.batch.size, spread.ring.size, spread.ulysses.size),
        "text": spread.text,
        "heads": q.shape[1],
        "key heads": k.shape[1],
        "channels a head": q.shape[3],
        "dtype": str(q.dtype),
        "mask": _form(at.call.mask),
        "backend": kernel_of(kernel).name,
        "around": str([type(part).__name__ for part in at.recipe.around]),
    }
    if spread.running.rows is None:
        facts["batch"] = q.shape[0]
    if not spread.uneven:
        facts["tokens"] = arranged.length if not spread.inside else tokens_of(at.recipe, at.call.x)
        facts["text tokens"] = arranged.text_keys
    agree(spread.everyone, facts)


def _form(mask: Any) -> str:
    return f"{list(mask.shape[1:])} {mask.dtype}" if isinstance(mask, Tensor) else str(type(mask))


def _own_table(table: Any, at: slice, axis: int, text: int) -> Any:
    """A table of positions for own tokens; `text` tokens before them are everyone's."""
    if table is None:
        return None
    if isinstance(table, Tensor):
        return table[:, at] if table.is_complex() or table.ndim > 2 else table[at]
    if not isinstance(table[0], Tensor):
        angles, positions = table
        return angles, tuple(position[:, at] for position in positions)
    return tuple(_own_entries(part, at, axis, text) for part in table)


def _own_entries(part: Tensor, at: slice, axis: int, text: int) -> Tensor:
    own = part.narrow(axis, text + at.start, at.stop - at.start)
    return torch.cat((part.narrow(axis, 0, text), own), dim=axis) if text else own


def _masks(proc: Processor, call: Call, spread: Spread) -> list[Any]:
    """Masks of image prompts for own tokens, which resizing leaves as they are."""
    axis = spread.tokens
    if spread.inside:
        counts = shares(tokens_of(proc.recipe, call.x), axis.size)
    elif spread.uneven:
        (counts,) = lengths(axis, call.x.shape[1], device=call.x.device)
    else:
        counts = (call.x.shape[1],) * axis.size
    at, total = spans(counts)[axis.rank], sum(counts)
    masks: Any = call.ip_masks
    if isinstance(masks, Tensor):
        masks = masks.unsqueeze(1) if masks.ndim == 4 else masks
    return [
        mask if mask is None or mask.ndim != 4 else region(mask[0], total)[:, at][None]
        for mask in masks
    ]
