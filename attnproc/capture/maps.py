"""Sums of attention weights by layer, and the pictures that they make."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..places import Slab, grid_of, sides
from ..rows import part_rows, rows_from, scoring_of, take
from ..types import Scoring
from .chosen import Labels, by_label, positions
from .fused import how_often, kind_of, launch_for, takes
from .weights import linear_weights, weights

if TYPE_CHECKING:
    from ..kernels.triton.maps import KeyMaps

__all__ = ["Heads", "Maps"]

Heads = Literal["mean", "each"] | Sequence[int]


class Maps:
    """Sums of attention weights by layer, for the words and regions that were asked for.

    Words name tokens of the text, regions parts of the image; the slab says which of them are
    queries and which keys. In an image-to-image slab regions are queries, words positions of keys.

    Args:
        words: Positions of tokens by label; None is every one.
        part: Which of how many equal parts of the batch is kept.
        regions: Parts of the image by label (`Box`, or positions); None is every token.
        slab: Queries and keys, as "image-text".
        steps: Which calls of a layer are kept, counted from 0; None is all.
        each_step: Whether calls are kept apart, in place of their sum.
        heads: "mean" over all heads, over those of a list, or "each" by itself.
        aspect: Height of the image's grid divided by its width.

    Attributes:
        taken: The weights by layer: their sum over calls, to which later ones may be added in
            place, or with `each_step` those of each.
        calls: How many calls were kept, by the layer's path.
    """

    def __init__(
        self,
        words: Labels = None,
        part: tuple[int, int] = (1, 2),
        *,
        regions: Labels = None,
        slab: Slab = "image-text",
        steps: Collection[int] | None = None,
        each_step: bool = False,
        heads: Heads = "mean",
        aspect: float = 1.0,
    ) -> None:
        self.keys = by_label(words)
        self.regions = by_label(regions, "regions")
        self.part, self.slab, self.aspect = part, slab, aspect
        self.steps = None if steps is None else frozenset(steps)
        self.each_step = each_step
        self.heads: Heads = heads if isinstance(heads, str) else tuple(heads)
        self.taken: dict[str, list[Tensor]] = {}
        self._chosen: dict[Any, _Chosen] = {}
        self._launches: dict[Any, KeyMaps | None] = {}
        self._counts: dict[Any, Tensor] = {}
        self.calls: dict[str, int] = {}
        self.seen: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Compiled kernels are not for files.
        return {**self.__dict__, "_launches": {}}

    def __repr__(self) -> str:
        of = "all keys" if self.keys is None else ", ".join(self.keys)
        return f"Maps({of}; {len(self.taken)} layers)"

    @property
    def sums(self) -> dict[str, Tensor]:
        """The weights ``[B, queries, keys]`` by layer, summed over calls.

        Of several keys of a label they are the sum, of several queries the mean. With
        ``heads="each"`` the heads are a second axis.
        """
        return {path: torch.stack(kept).sum(dim=0) for path, kept in self.taken.items()}

    @property
    def words(self) -> list[str]:
        """The labels of `mean`, in order."""
        labels = self._labels
        if labels is not None:
            return list(labels)
        first = self._of("*", None, None)[0]
        return [str(i) for i in range(first.shape[-2 if self._over_keys else -1])]

    def __getitem__(self, word: str) -> Tensor:
        """The map ``[B, height, width]`` of one word, as `mean` gives it."""
        if word not in self.words:
            raise KeyError(f"{word!r} was not captured, there are {', '.join(self.words)}")
        return self.mean()[:, self.words.index(word)]

    def mean(
        self,
        layers: str = "*",
        *,
        tokens: int | None = None,
        aspect: float | None = None,
        step: int | None = None,
        head: int | None = None,
    ) -> Tensor:
        """The mean over layers, calls and heads, as pictures.

        Args:
            layers: Pattern of the layers' paths.
            tokens: Only layers whose pictures have so many tokens.
            aspect: Height of the grid divided by its width, if it differs from the capture's.
            step: Only this one of the calls that were kept; needs ``each_step=True``.
            head: Only this head; needs ``heads="each"``.

        Returns:
            Weights ``[B, labels, height, width]`` on the largest of the layers' grids, to which
            smaller ones are interpolated.

        Raises:
            ValueError: No captured layer fits, or the tokens are no grid of that aspect.
        """
        aspect = self.aspect if aspect is None else aspect
        planes = [self._planes(w, head) for w in self._of(layers, tokens, step)]
        grids = [plane.unflatten(-1, grid_of(plane.shape[-1], aspect)) for plane in planes]
        size = max((grid.shape[-2:] for grid in grids), key=math.prod)
        same = [F.interpolate(grid, size, mode="bilinear", antialias=True) for grid in grids]
        return torch.stack(same).mean(dim=0)

    def save(self, path: str | Path) -> None:
        """Writes the weights to a ``.npz`` or ``.safetensors`` file, for `Maps.load`."""
        from .saving import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Maps:
        """The maps of a file that `save` wrote."""
        from .saving import load

        return load(path)

    def wants(self, layer: str) -> bool:
        """Counts a call of a layer; whether it is one of those to keep."""
        step = self.seen.get(layer, 0)
        self.seen[layer] = step + 1
        return self.steps is None or step in self.steps

    def reduced(
        self,
        q: Tensor,
        k: Tensor,
        scoring: Scoring,
        lse: Tensor | None = None,
        linear: bool = False,
        layer: str = "",
    ) -> Tensor:
        """One call's weights ``[B, (H,) queries, keys]`` of q ``[B, H, Q, D]`` and its keys.

        Args:
            q: All queries, of the whole batch.
            k: All keys ``[B, H', K, D]``.
            scoring: Masks and scale, as the kernel gets them.
            lse: Log-sum-exp ``[B, H, Q]`` of the scores, if the kernel gave it.
            linear: Whether it is attention without a softmax.
            layer: Where they may be added to the sum straight away: then that sum is returned.
        """
        if lse is None and not linear and not torch.compiler.is_compiling():
            launch = self._launch(q, k, scoring)
            if launch is not None:
                kept = None if self.each_step else self.taken.get(layer)
                return launch(q, k, scoring.mask and scoring.mask[0], kept[0] if kept else None)
        rows = part_rows(self.part, q.shape[0])
        chosen = self._choice(q.shape[2], k.shape[2], scoring)
        if torch.is_autocast_enabled(q.device.type):
            # It would round the scores.
            with torch.autocast(q.device.type, enabled=False):
                return self.reduced(q, k, scoring, lse, linear)
        scoring = scoring_of(scoring, rows, q.shape[0])
        with torch.no_grad():
            q, k = rows_from(q.detach(), rows), rows_from(k.detach(), rows)
            if linear:
                parts = linear_weights(q, k, scoring, chosen.of_q, chosen.of_k)
            else:
                lse = None if lse is None else rows_from(lse.detach(), rows)
                parts = weights(q, k, scoring, chosen.of_q, chosen.of_k, lse)
            return self._grouped(parts, chosen)

    def add(self, layer: str, found: Tensor) -> None:
        """Adds what `reduced` gave for a call."""
        kept = self.taken.setdefault(layer, [])
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if self.each_step or not kept:
            kept.append(found)
        elif kept[0] is not found:
            kept[0] = kept[0] + found

    def _launch(self, q: Tensor, k: Tensor, scoring: Scoring) -> KeyMaps | None:
        """The launch that gives `reduced` for calls of this kind, worked out once a kind."""
        kind = kind_of(q, k, scoring) if self.heads == "mean" else None
        if kind is None:
            return None
        try:
            return self._launches[kind]
        except KeyError:
            found = self._launches[kind] = self._new_launch(q, k, scoring)
            return found

    def _new_launch(self, q: Tensor, k: Tensor, scoring: Scoring) -> KeyMaps | None:
        rows = part_rows(self.part, q.shape[0])
        chosen = self._choice(q.shape[2], k.shape[2], scoring)
        of_q, groups = chosen.of_q, chosen.cols or [[i] for i in chosen.of_k]
        if not isinstance(of_q, range) or not takes(q, k, scoring, len(groups)):
            return None
        kind = k.shape[2], scoring.image_keys, q.device
        if kind not in self._counts:
            self._counts[kind] = how_often(groups, k.shape[2], q.device)
        return launch_for(q, k, scoring, self._counts[kind], rows, of_q)

    def _grouped(self, parts: Iterable[Tensor], chosen: _Chosen) -> Tensor:
        """Weights ``[B, H, some of the queries, keys]`` over heads and labels."""
        chunks = [_joined(self._of_heads(part), chosen.cols) for part in parts]
        found = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-2)
        if chosen.rows is None:
            return found
        groups = found.split([len(group) for group in chosen.rows], dim=-2)
        return torch.stack([group.mean(dim=-2) for group in groups], dim=-2)

    def _choice(self, queries: int, keys: int, scoring: Scoring) -> _Chosen:
        """What is chosen of so many queries and keys, worked out once."""
        if torch.compiler.is_compiling():
            return self._choose(queries, keys, scoring)
        kind = queries, keys, scoring.image, scoring.image_keys
        found = self._chosen.get(kind)
        if found is None:
            found = self._chosen[kind] = self._choose(queries, keys, scoring)
        return found

    def _choose(self, queries: int, keys: int, scoring: Scoring) -> _Chosen:
        rooms = sides(cast("Any", self.slab), scoring, queries, keys)
        rows = positions(self._rows, rooms[0], self.aspect, "regions")
        cols = positions(self._cols, rooms[1], self.aspect, "words")
        of_q, of_k = (
            room if groups is None else [i for group in groups for i in group]
            for groups, room in zip((rows, cols), rooms, strict=True)
        )
        return _Chosen(rows, cols, of_q, of_k)

    @property
    def _rows(self) -> dict[str, Any] | None:
        return self.keys if self.slab.startswith("text") else self.regions

    @property
    def _cols(self) -> dict[str, Any] | None:
        return self.regions if self.slab == "text-image" else self.keys

    @property
    def _over_keys(self) -> bool:
        """Whether the pictures lie along the keys, and the labels along the queries."""
        return self.slab == "text-image" or (self._rows is not None and self._cols is None)

    @property
    def _labels(self) -> dict[str, Any] | None:
        return self._rows if self._over_keys else self._cols

    def _of_heads(self, part: Tensor) -> Tensor:
        """Weights ``[B, H, rows, cols]`` over the heads that were asked for."""
        if self.heads == "each":
            # Some columns would keep the memory of all.
            return part.contiguous()
        if self.heads != "mean":
            part = take(part, [range(part.shape[1])[head] for head in self.heads], 1)
        return part.mean(dim=1)

    def _planes(self, found: Tensor, head: int | None) -> Tensor:
        """Weights as ``[B, labels, tokens]``."""
        if self.heads == "each":
            found = found.mean(dim=1) if head is None else found[:, head]
        return found if self._over_keys else found.transpose(-1, -2)

    def _of(self, layers: str, tokens: int | None, step: int | None) -> list[Tensor]:
        """Mean weights over calls of the layers that fit."""
        axis = -1 if self._over_keys else -2
        found: list[Tensor] = [
            torch.stack(kept).sum(dim=0) / self.calls[path] if step is None else kept[step]
            for path, kept in self.taken.items()
            if fnmatch.fnmatchcase(path, layers) and tokens in (None, kept[0].shape[axis])
        ]
        if not found:
            have = (f"{path} ({kept[0].shape[axis]})" for path, kept in self.taken.items())
            raise ValueError(
                f"layers={layers!r}, tokens={tokens}: no such layer was captured; captured with "
                f"their queries: {', '.join(have) or 'none'}"
            )
        return found


class _Chosen(NamedTuple):
    """Positions of a call's queries and keys, a group a label, and all of them."""

    rows: list[list[int]] | None
    cols: list[list[int]] | None
    of_q: Sequence[int]
    of_k: Sequence[int]


def _joined(found: Tensor, groups: list[list[int]] | None) -> Tensor:
    """Sums over the keys of a label."""
    if groups is None or all(len(group) == 1 for group in groups):
        return found
    parts = found.split([len(group) for group in groups], dim=-1)
    sums = [part if part.shape[-1] == 1 else part.sum(dim=-1, keepdim=True) for part in parts]
    return torch.cat(sums, dim=-1)
