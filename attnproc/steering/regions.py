"""Regional prompts: each part of the prompt speaks to a part of the picture."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..masks import joined
from ..places import Box, grid_of, side
from ..types import Bias, KernelCall, Positional, Scoring
from .strength import Strength, now

__all__ = ["Region", "Regional"]


@dataclass(frozen=True)
class Region:
    """Tokens of the prompt and where in the picture they are seen.

    Args:
        start: The first of the tokens.
        stop: The token after the last.
        box: Where; None is the background, wherever no other region is.
        soft: Width of the edges in fractions of the picture; 0 is a hard edge. A side on the
            picture's border has no edge.
    """

    start: int
    stop: int
    box: Box | None
    soft: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"start and stop are {self.start}, {self.stop}: no tokens")
        if self.soft < 0:
            raise ValueError(f"soft is {self.soft}, possible are widths from 0 on")


@dataclass(frozen=True)
class Regional:
    """Lets the picture's tokens see the words of their region alone.

    Tokens of the prompt that belong to no region are seen everywhere. In a joint sequence the
    words of a region see that part of the picture, themselves, and the words of no region.

    Hard edges are a function of positions: FlexAttention skips what they hide, other kernels get
    it as a mask. Soft edges and strengths below 1 are a bias.

    Args:
        regions: The regions; they may overlap.
        isolate: Whether in a joint sequence the tokens of a region see no picture outside it.
        aspect: Height of the picture divided by its width.
        strength: From 0, no regions, to 1; also a tensor or a `Schedule`.
        base: For prompts that were put one after another, of which the background's is about the
            whole picture: how far that one is seen in the other regions too, from 0 to 1. At
            strength 0 it alone is seen. None where regions are spans of one prompt, which is
            seen as it is then.

    Raises:
        ValueError: There is a `base` without a background.

    Source: https://arxiv.org/abs/2411.02395
    """

    regions: tuple[Region, ...]
    isolate: bool = False
    aspect: float = 1.0
    strength: Strength = 1.0
    base: float | None = None
    name: ClassVar[str] = "regions"

    def __post_init__(self) -> None:
        if self.base is None:
            return
        if not 0 <= self.base <= 1:
            raise ValueError(f"base is {self.base}, possible are numbers from 0 to 1")
        if all(region.box for region in self.regions):
            raise ValueError("base is the share of a region without a box, and all have one")

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        strength = now(self.strength)
        steady = not isinstance(strength, Tensor)
        if steady and strength == 0 and self.base is None:
            return kernel(q, k, v, scoring)
        layout = _layout(self, scoring, q.shape[2], k.shape[2])
        hard = not self.base and not any(region.soft for region in self.regions)
        if steady and strength == 1 and hard:
            scoring = scoring.but(mods=(*scoring.mods, _Seen(layout)))
            return kernel(q, k, v, scoring)
        made = _both if torch.compiler.is_compiling() else _kept_both
        plain, seen = made(layout, q.device)  # [Q, K]
        shown = plain + strength * (seen - plain)
        bias = Bias(shown.log().to(q.dtype)[None, None])
        mask = joined(scoring.mask, bias)
        return kernel(q, k, v, scoring.but(mask=mask))


@dataclass(frozen=True)
class _Layout:
    """The regions in one layer: where image and text stand, and the image's grid."""

    regions: tuple[Region, ...]
    isolate: bool
    height: int
    width: int
    queries: tuple[int, int]
    """The first query of the image, and how many queries there are."""
    keys: tuple[int, int]
    """The first key of the image where there are any, and how many keys there are."""
    text: int
    """The first key of the text."""
    joint: bool
    base: float | None


def _layout(regional: Regional, scoring: Scoring, queries: int, keys: int) -> _Layout:
    joint = scoring.image_keys is not None
    image, text = side("image", scoring.image, queries), side("text", scoring.image_keys, keys)
    last = max(region.stop for region in regional.regions)
    if last > len(text):
        raise ValueError(f"regions reach token {last - 1}, the text has {len(text)} tokens")
    first = (scoring.image_keys or (0, 0))[0]
    return _Layout(
        regional.regions,
        regional.isolate,
        *grid_of(len(image), regional.aspect),
        (image.start, queries),
        (first, keys),
        text.start,
        joint,
        regional.base,
    )


@dataclass(frozen=True, eq=False)
class _Seen(Positional):
    """Which keys are seen, as a function of positions."""

    layout: _Layout

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        lay = self.layout
        seen = (i >= 0) & (j >= 0)
        for region in lay.regions:
            # On either side: whether it is of the region's words, or of the picture outside.
            said = _is_text(lay, j, region)
            out = _outside(lay, i - lay.queries[0], region)
            seen = seen & ~(said & out)
            if lay.joint and lay.queries[1] > lay.height * lay.width:
                said_i = _is_text(lay, i, region)
                out_j = _outside(lay, j - lay.keys[0], region)
                seen = seen & ~(said_i & (out_j | _other_text(lay, j, region)))
            if lay.joint and lay.isolate:
                within = _inside(lay, i - lay.queries[0], region)
                seen = seen & ~(within & _outside(lay, j - lay.keys[0], region))
        return seen


def _is_text(lay: _Layout, at: Tensor, region: Region) -> Tensor:
    return (at >= lay.text + region.start) & (at < lay.text + region.stop)


def _other_text(lay: _Layout, at: Tensor, region: Region) -> Tensor:
    """Words of other regions."""
    found = at < 0
    for other in lay.regions:
        if other is not region:
            found = found | _is_text(lay, at, other)
    return found


def _in_image(lay: _Layout, at: Tensor) -> Tensor:
    return (at >= 0) & (at < lay.height * lay.width)


def _outside(lay: _Layout, at: Tensor, region: Region) -> Tensor:
    return _in_image(lay, at) & ~_inside(lay, at, region)


def _inside(lay: _Layout, at: Tensor, region: Region) -> Tensor:
    """Whether tokens of the image, counted from its first, are of a region."""
    if region.box is not None:
        return _in_image(lay, at) & _in_box(lay, at, region.box)
    found = _in_image(lay, at)
    for other in lay.regions:
        if other.box is not None:
            found = found & ~_in_box(lay, at, other.box)
    return found


def _in_box(lay: _Layout, at: Tensor, box: Box) -> Tensor:
    rows, cols = box.spans(lay.height, lay.width)
    row, col = at // lay.width, at % lay.width
    return (row >= rows.start) & (row < rows.stop) & (col >= cols.start) & (col < cols.stop)


def _both(lay: _Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """How far each key is seen by each query ``[Q, K]`` without regions, and with them."""
    plain = torch.ones(lay.queries[1], lay.keys[1], device=device)
    for region in lay.regions:
        if lay.base is not None and region.box:
            words = slice(lay.text + region.start, lay.text + region.stop)
            plain[:, words] = 0
            if lay.joint:
                # They see themselves, so that no row is empty.
                plain[words, words] = 1
    return plain, _visible(lay, device)


_kept_both = functools.lru_cache(maxsize=64)(_both)


def _visible(lay: _Layout, device: torch.device) -> Tensor:
    """How far each key is seen by each query ``[Q, K]``, from 0 to 1."""
    shares = {region: _share(lay, region, device) for region in lay.regions if region.box}
    rest = torch.ones(lay.height * lay.width, device=device)
    for share in shares.values():
        rest = torch.minimum(rest, 1 - share)
    rest = rest.clamp(min=lay.base or 0.0)

    shown = torch.ones(lay.queries[1], lay.keys[1], device=device)
    q = slice(lay.queries[0], lay.queries[0] + lay.height * lay.width)
    k = slice(lay.keys[0], lay.keys[0] + lay.height * lay.width)
    for region in lay.regions:
        share = shares.get(region, rest)
        words = slice(lay.text + region.start, lay.text + region.stop)
        shown[q, words] = torch.minimum(shown[q, words], share[:, None])
        if lay.joint and lay.queries[1] > lay.height * lay.width:
            shown[words, k] = torch.minimum(shown[words, k], share)
            for other in lay.regions:
                if other is not region:
                    shown[words, lay.text + other.start : lay.text + other.stop] = 0
        if lay.joint and lay.isolate:
            shown[q, k] = torch.minimum(shown[q, k], 1 - share[:, None] * (1 - share))
    return shown


def _share(lay: _Layout, region: Region, device: torch.device) -> Tensor:
    """How far each token of the image is in a region ``[S]``: a ramp across soft edges."""
    at = torch.arange(lay.height * lay.width, device=device)
    box = region.box or Box(0, 0, 1, 1)
    if not region.soft:
        return _in_box(lay, at, box).float()
    x, y = (at % lay.width + 0.5) / lay.width, (at // lay.width + 0.5) / lay.height
    sides = ((x, box.left, 1), (x, box.right, -1), (y, box.top, 1), (y, box.bottom, -1))
    inner = [(place - edge) * sign for place, edge, sign in sides if 0 < edge < 1]
    if not inner:
        return torch.ones_like(x)
    depth = torch.stack(inner).amin(dim=0)  # to the nearest edge, below 0 outside
    return (depth / region.soft + 0.5).clamp(0, 1)
