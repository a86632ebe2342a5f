"""Attention maps of chosen keys, summed while a model runs.

A map is computed from the queries and keys that the kernel gets, beside the kernel: the output
does not change by a bit, and any kernel, mask or other part may be in use.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .interop import processors, put
from .kernels.reference import expand_heads, factor, masked_scores
from .kernels.visible import OfRows, merged, structure, values
from .on import Kind, kind_of
from .processor import Processor
from .types import KernelCall, Scoring

__all__ = ["Capture", "Maps", "capture", "key_weights"]

# Scores held at a time, over batch, heads, queries of a chunk and all keys.
_CHUNK = 1 << 22

Words = Mapping[str, int | Sequence[int]] | Sequence[int] | None


class Maps:
    """Sums of attention weights by layer, for the words that were asked for.

    Args:
        words: Positions of keys by label; None is every key.
        part: Which of how many equal parts of the batch is kept.

    Attributes:
        sums: The weights ``[B, Q, words]`` by the layer's path: mean over heads, sum over calls.
        calls: How many calls were summed, by the layer's path.
    """

    def __init__(self, words: Words = None, part: tuple[int, int] = (1, 2)) -> None:
        self.keys = _by_label(words)
        self.part = part
        self.sums: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def __repr__(self) -> str:
        of = "all keys" if self.keys is None else ", ".join(self.keys)
        return f"Maps({of}; {len(self.sums)} layers)"

    @property
    def words(self) -> list[str]:
        """The labels, in the order of the last axis of the sums."""
        if self.keys is not None:
            return list(self.keys)
        return [str(i) for i in range(self._of("*", None)[0].shape[-1])]

    def __getitem__(self, word: str) -> Tensor:
        """The map ``[B, height, width]`` of one word, as `mean` gives it."""
        if word not in self.words:
            raise KeyError(f"{word!r} was not captured, there are {', '.join(self.words)}")
        return self.mean()[:, self.words.index(word)]

    def mean(self, layers: str = "*", *, tokens: int | None = None, aspect: float = 1.0) -> Tensor:
        """The mean over layers and calls, as pictures.

        Args:
            layers: Pattern of the layers' paths.
            tokens: Only layers with so many queries.
            aspect: Height of the queries' grid divided by its width.

        Returns:
            Weights ``[B, words, height, width]`` on the largest of the layers' grids, to which
            smaller ones are interpolated.

        Raises:
            ValueError: No captured layer fits, or the queries are no grid of that aspect.
        """
        grids = [_grid(weights, aspect) for weights in self._of(layers, tokens)]
        size = max((grid.shape[-2:] for grid in grids), key=math.prod)
        same = [F.interpolate(grid, size, mode="bilinear", antialias=True) for grid in grids]
        return torch.stack(same).mean(dim=0)

    def add(self, layer: str, q: Tensor, k: Tensor, scoring: Scoring) -> None:
        """Adds one call's weights: q ``[B, H, Q, D]``, k ``[B, H', K, D]``."""
        index, count = self.part
        batch = q.shape[0]
        if batch % count:
            raise ValueError(
                f"part is {self.part}: a batch of {batch} has no {count} equal parts; give "
                "part=(0, 1) to keep all of it, as without classifier-free guidance"
            )
        rows = slice(index * batch // count, (index + 1) * batch // count)
        q, k = q.detach()[rows], k.detach()[rows]
        scoring = _of_rows(scoring, rows, batch)
        queries, texts = _image_queries(scoring, q.shape[2]), _text_keys(scoring, k.shape[2])

        groups = [[i] for i in range(len(texts))] if self.keys is None else self.keys.values()
        columns = [i for group in groups for i in group]
        _check(columns, len(texts))
        each = key_weights(q, k, torch.tensor(columns) + texts.start, scoring, queries)
        sizes = [len(group) for group in groups]
        if max(sizes) > 1:
            each = torch.stack([t.sum(dim=-1) for t in torch.split(each, sizes, dim=-1)], dim=-1)
        self._add(layer, each)

    def _add(self, layer: str, weights: Tensor) -> None:
        before = self.sums.get(layer)
        self.sums[layer] = weights if before is None else before + weights
        self.calls[layer] = self.calls.get(layer, 0) + 1

    def _of(self, layers: str, tokens: int | None) -> list[Tensor]:
        """Mean weights ``[B, Q, words]`` of the layers that fit."""
        found = [
            total / self.calls[path]
            for path, total in self.sums.items()
            if fnmatch.fnmatchcase(path, layers) and tokens in (None, total.shape[1])
        ]
        if not found:
            have = ", ".join(f"{path} ({w.shape[1]})" for path, w in self.sums.items()) or "none"
            raise ValueError(
                f"layers={layers!r}, tokens={tokens}: no such layer was captured; captured with "
                f"their queries: {have}"
            )
        return found


@dataclass(frozen=True)
class Capture:
    """Records the weights of chosen keys beside the kernel call.

    As the outermost wrapper it sees the whole batch and all heads: what slicing or perturbation
    further in make of the call does not show.

    Args:
        maps: Where the sums are kept.
        layer: Their name there.
    """

    maps: Maps
    layer: str
    name: ClassVar[str] = "capture"

    def __call__(
        self, kernel: KernelCall, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
    ) -> Tensor:
        with torch.no_grad():
            self.maps.add(self.layer, q, k, scoring)
        return kernel(q, k, v, scoring)


@contextmanager
def capture(
    model: nn.Module,
    words: Words = None,
    layers: str | Sequence[str] = "*",
    *,
    kind: Kind = "cross",
    part: tuple[int, int] = (1, 2),
) -> Generator[Maps]:
    """Captures attention maps while the block runs; around any call of the model or its pipeline.

    The processors of the matching layers are replaced by copies for the block, which share their
    weights; what is set on a processor inside the block goes with the copy.

    Args:
        model: A model whose processors are ours, as after `attnproc.swap(model)`.
        words: Positions of keys (tokens of the prompt) by label; several positions are summed. A
            list of positions labels itself; None captures every key.
        layers: Pattern of the paths of attention modules, such as `"*attn2"`, or several.
        kind: `"cross"`, `"self"` or `"joint"` (the image's queries, the text's keys).
        part: Which of how many equal parts of the batch is kept, counted from 0: the second of two
            by default, which is the conditional half under classifier-free guidance. Without
            guidance give (0, 1).

    Yields:
        The maps, which fill as the model runs.

    Raises:
        ValueError: No layer matches, or a matching layer's processor is not ours.
    """
    maps = Maps(words, part)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    chosen = [(path, attn) for path, attn in _modules(model, kind) if _matches(path, patterns)]
    if not chosen:
        have = ", ".join(path for path, _ in _modules(model, kind)) or "none"
        raise ValueError(f"layers={layers!r} matches no {kind} attention; there are: {have}")
    for path, attn in chosen:
        if not isinstance(attn.processor, Processor):
            raise ValueError(
                f"{path} runs on {type(attn.processor).__name__}, which is not of attnproc: call "
                "attnproc.swap(model) first"
            )

    taken: list[tuple[Any, Processor, Processor]] = []
    try:
        for path, attn in chosen:
            old: Processor = attn.processor
            new = old.but(around=(Capture(maps, path), *old.recipe.around))
            put(attn, new)
            taken.append((attn, old, new))
        yield maps
    finally:
        for attn, old, new in taken:
            if attn.processor is new:
                put(attn, old)


def key_weights(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    scoring: Scoring,
    queries: slice | None = None,
) -> Tensor:
    """Attention weights of some keys, exact, in memory for some queries at a time.

    Args:
        q: Queries ``[B, H, Q, D]``.
        k: All keys ``[B, H', K, D]``; the softmax is over all of them.
        keys: Positions of the n keys whose weights are wanted.
        scoring: Mask, causality and scale, as the kernel gets them.
        queries: Which queries; None is all.

    Returns:
        Their weights ``[B, Q, n]``, mean over heads, in float32 at least. Queries with nothing to
        attend to have none.
    """
    batch, heads, total, keys_total = *q.shape[:3], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, keys = expand_heads(k, q).to(wide).transpose(-1, -2), keys.to(q.device)
    mask, every = values(scoring), slice(0, keys_total)
    start, stop, _ = (queries or slice(None)).indices(total)
    step = max(1, _CHUNK // (batch * heads * keys_total))

    found: list[Tensor] = []
    for first in range(start, stop, step):
        rows = slice(first, min(first + step, stop))
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        seen = merged(part, structure(scoring, rows, every, batch, heads, q.device))
        scores = (q[:, :, rows].to(wide) @ k) * factor(q, scoring)
        scores = masked_scores(scores, seen)  # [B, H, rows, K]
        norm = scores.logsumexp(dim=-1, keepdim=True)
        weights = (scores[..., keys] - norm).exp().masked_fill(norm == -torch.inf, 0)
        if scoring.keep is not None:
            weights = weights * scoring.keep[:, None, rows, None]
        found.append(weights.mean(dim=1))
    return torch.cat(found, dim=1)


def _of_rows(scoring: Scoring, rows: slice, batch: int) -> Scoring:
    """The scoring of a part of the batch."""
    mask, keep = scoring.mask, scoring.keep
    if mask is not None and mask[0].shape[0] == batch:
        mask = type(mask)(mask[0][rows])
    mods = tuple(OfRows(mod, rows.start) for mod in scoring.mods)
    return scoring._replace(mask=mask, mods=mods, keep=None if keep is None else keep[rows])


def _image_queries(scoring: Scoring, queries: int) -> slice:
    start, stop = scoring.image or (0, queries)
    return slice(start, stop)


def _text_keys(scoring: Scoring, keys: int) -> range:
    """The keys that may be chosen: of a joint sequence those of the text."""
    if scoring.image_keys is None:
        return range(keys)
    start, stop = scoring.image_keys
    return range(start) if start else range(stop, keys)


def _grid(weights: Tensor, aspect: float) -> Tensor:
    """Weights ``[B, Q, words]`` as pictures ``[B, words, height, width]``."""
    tokens = weights.shape[1]
    height = round(math.sqrt(tokens * aspect))
    if height == 0 or tokens % height:
        raise ValueError(f"aspect is {aspect}: {tokens} queries are no grid of that aspect")
    return weights.transpose(1, 2).reshape(*weights.shape[::2], height, -1)


def _by_label(words: Words) -> dict[str, list[int]] | None:
    if words is None:
        return None
    if not isinstance(words, Mapping):
        words = {str(index): index for index in words}
    if not words:
        raise ValueError("words is empty: give positions of keys, or None for all of them")
    return {
        key: [value] if isinstance(value, int) else list(value) for key, value in words.items()
    }


def _check(columns: list[int], keys: int) -> None:
    outside = [i for i in columns if not 0 <= i < keys]
    if outside:
        raise ValueError(f"words has positions {outside}, this layer has keys 0 to {keys - 1}")


def _modules(model: nn.Module, kind: Kind) -> list[tuple[str, Any]]:
    return [(path, attn) for path, attn in processors(model) if kind_of(attn) == kind]


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
