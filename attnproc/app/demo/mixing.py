"""Mixes training pictures and their captions on the device, a batch at a time."""

# The libraries used here are typed in part only.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from attnproc.app.demo.data import Entry, captions, vocabulary
from attnproc.app.demo.palette import GROUNDS, NOVEL_LOOKS, NOVEL_PAIRS, TINTS
from attnproc.app.demo.vocabulary import BOS, EOS, LENGTH, PAD, SPECIAL, UNKNOWN

__all__ = ["Batch", "Mixer", "Shares", "paint", "tint"]

VARIANTS = 24
PHRASE = 10
VOWELS = tuple("aeiou")


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        pictures: RGB in -1 to 1, [B, 3, 64, 64].
        tokens: Captions, [B, 24].
    """

    pictures: Tensor
    tokens: Tensor


class _Plan(NamedTuple):
    """What each picture of a batch shall show, all [B]."""

    first: Tensor
    second: Tensor
    hue: Tensor
    ground: Tensor
    pair: Tensor
    tinted: Tensor
    grounded: Tensor


@dataclass(frozen=True)
class Shares:
    """How often each kind of picture is drawn; the rest is plain single pictures.

    Attributes:
        ground: Single on a coloured ground.
        tint: Single, tinted.
        both: Single, tinted, on a coloured ground.
        pair: Two side by side.
        pair_ground: Two side by side on a coloured ground.
    """

    ground: float = 0.12
    tint: float = 0.11
    both: float = 0.05
    pair: float = 0.34
    pair_ground: float = 0.05

    def weights(self, pairs: float) -> list[float]:
        """Weights of plain, ground, tint, both, pair, pair_ground, with `pairs` of all pairs."""
        pair, pair_ground = self.pair * pairs, self.pair_ground * pairs
        rest = 1 - self.ground - self.tint - self.both - pair - pair_ground
        return [rest, self.ground, self.tint, self.both, pair, pair_ground]


def tint(picture: Tensor, colour: Tensor) -> Tensor:
    """Keeps the luminance of a picture and takes its hue from a colour.

    Args:
        picture: Premultiplied RGBA in 0 to 1, [B, 4, H, W].
        colour: RGB in 0 to 1, [B, 3].
    """
    luma = picture.new_tensor([0.299, 0.587, 0.114])
    alpha = picture[:, 3:]
    light = (picture[:, :3] * luma[:, None, None]).sum(1, keepdim=True) / alpha.clamp(min=1e-3)
    light = 0.1 + 0.7 * light.clamp(0, 1)

    middle = (colour * luma).sum(1).clamp(0.5, 0.75)[:, None, None, None]
    colour = colour[:, :, None, None]
    dark = colour * (light / middle)
    pale = colour + (1 - colour) * ((light - middle) / (1 - middle))
    hued = torch.where(light < middle, dark, pale).clamp(0, 1)
    return torch.cat([hued * alpha, alpha], 1)


def paint(layer: Tensor, ground: Tensor) -> Tensor:
    """Lays premultiplied RGBA [B, 4, H, W] over a colour [B, 3]; RGB in -1 to 1."""
    return (layer[:, :3] + ground[:, :, None, None] * (1 - layer[:, 3:])) * 2 - 1


def _article(word: str) -> str:
    return "an" if word.startswith(VOWELS) else "a"


class Mixer:
    """Draws batches from a training set that lies on the device.

    Args:
        pictures: Premultiplied RGBA bytes, [N, 4, 64, 64].
        entries: The N entries.
        device: Where to draw.
        shares: Shares of the kinds.
        seed: Seed of the captions' choice.
    """

    def __init__(
        self,
        pictures: np.ndarray,
        entries: list[Entry],
        *,
        device: torch.device,
        shares: Shares | None = None,
        seed: int = 0,
    ) -> None:
        self.device = device
        self.shares = shares or Shares()
        self.ids = {word: n for n, word in enumerate([*SPECIAL, *vocabulary(entries)])}
        self.full = torch.from_numpy(pictures).to(device)
        self.weight = self._tensor([entry.weight for entry in entries])
        self.pair_weight = self._tensor([entry.pair_weight for entry in entries])
        self.tintable = torch.tensor([entry.tintable for entry in entries], device=device)
        self.tints = self._tensor(list(TINTS.values())) / 255
        self.grounds = self._tensor(list(GROUNDS.values())) / 255
        self.tint_words = self._words(list(TINTS))
        self.ground_words = self._words(list(GROUNDS))
        self.tint_articles = self._words([_article(name) for name in TINTS])
        self.ground_articles = self._words([_article(name) for name in GROUNDS])
        self.emphasise(1.0)
        self._hold_out(entries)
        self._write_phrases(entries, random.Random(seed))

    def emphasise(self, pairs: float) -> None:
        """Sets the factor on the shares of the two kinds of pairs."""
        self.kinds = self._tensor(self.shares.weights(pairs))

    def draw(self, size: int) -> Batch:
        """Draws a batch of `size` pictures."""
        plan = self._plan(size)
        return Batch(self._compose(plan), self._caption(plan))

    def _plan(self, size: int) -> _Plan:
        kind = self._pick(self.kinds, size)
        pair, grounded = kind >= 4, (kind == 1) | (kind == 3) | (kind == 5)
        half, second = self._pick(self.pair_weight, size), self._pick(self.pair_weight, size)
        first = torch.where(pair, half, self._pick(self.weight, size))
        hue = torch.randint(len(TINTS), (size,), device=self.device)
        ground = torch.randint(len(GROUNDS), (size,), device=self.device)

        unseen = torch.isin(first * len(self.full) + second, self.novel_pairs) | (first == second)
        tinted = ((kind == 2) | (kind == 3)) & self.tintable[first]
        grounded = grounded & ~(tinted & self.novel_looks[hue, ground])
        return _Plan(first, second, hue, ground, pair & ~unseen, tinted, grounded)

    def _compose(self, plan: _Plan) -> Tensor:
        single = self.full[plan.first].float() / 255  # [B, 4, 64, 64]
        other = functional.avg_pool2d(self.full[plan.second].float() / 255, 2)
        halves = torch.cat([functional.avg_pool2d(single, 2), other], 3)  # [B, 4, 32, 64]
        halves = functional.pad(halves, (0, 0, 16, 16))

        coloured = tint(single, self.tints[plan.hue])
        layer = torch.where(plan.tinted[:, None, None, None], coloured, single)
        layer = torch.where(plan.pair[:, None, None, None], halves, layer)
        colour = torch.where(plan.grounded[:, None], self.grounds[plan.ground], 1.0)
        return paint(layer, colour)

    def _caption(self, plan: _Plan) -> Tensor:
        size = len(plan.first)
        article = self._chance(size, 0.25)
        phrase, phrase_article = self._phrase(plan.first, plan.pair)
        phrase2, phrase2_article = self._phrase(plan.second, plan.pair)
        start = torch.where(plan.tinted, self.tint_articles[plan.hue], phrase_article)
        on_a = self.ground_articles[plan.ground]
        pieces = [
            (start[:, None], article),
            (self.tint_words[plan.hue][:, None], plan.tinted),
            (phrase, None),
            (self._constant("and", size), plan.pair),
            (phrase2_article[:, None], plan.pair & article),
            (phrase2, plan.pair),
            (self._constant("on", size), plan.grounded),
            (on_a[:, None], plan.grounded & self._chance(size, 0.8)),
            (self.ground_words[plan.ground][:, None], plan.grounded),
            (self._constant("background", size), plan.grounded),
        ]
        kept = [ids if use is None else torch.where(use[:, None], ids, PAD) for ids, use in pieces]
        text = torch.cat(kept, 1)
        return self._pack(torch.where(self._chance(size, 0.1)[:, None], PAD, text))

    def _pack(self, text: Tensor) -> Tensor:
        """Closes the gaps in [B, L], blots out a few words, adds `<bos>` and `<eos>`: [B, 24]."""
        order = (text == PAD).long().argsort(stable=True, dim=1)
        text = text.gather(1, order)[:, : LENGTH - 2]
        blotted = (torch.rand(text.shape, device=self.device) < 0.01) & (text != PAD)
        text = torch.where(blotted, UNKNOWN, text)

        tokens = functional.pad(text, (1, 1), value=PAD)
        tokens[:, 0] = BOS
        return tokens.scatter(1, (text != PAD).sum(1, keepdim=True) + 1, EOS)

    def _phrase(self, index: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        """A caption of each picture, [B, 10], and its article; in pairs the label alone."""
        variant = torch.randint(VARIANTS, index.shape, device=self.device)
        variant = torch.where(pair, VARIANTS, variant)
        return self.phrases[index, variant], self.articles[index, variant]

    def _hold_out(self, entries: list[Entry]) -> None:
        names = {entry.labels[0]: index for index, entry in enumerate(entries)}
        both = [pair for one, two in NOVEL_PAIRS for pair in ((one, two), (two, one))]
        codes = [
            names[one] * len(entries) + names[two]
            for one, two in both
            if one in names and two in names
        ]
        self.novel_pairs = torch.tensor(codes, dtype=torch.long, device=self.device)
        # A thing on a ground of its own colour can't be seen, so this is never drawn either.
        looks = [[(one, two) in NOVEL_LOOKS or one == two for two in GROUNDS] for one in TINTS]
        self.novel_looks = torch.tensor(looks, device=self.device)

    def _write_phrases(self, entries: list[Entry], rng: random.Random) -> None:
        phrases = torch.full((len(entries), VARIANTS + 1, PHRASE), PAD)
        articles = torch.zeros(len(entries), VARIANTS + 1, dtype=torch.long)
        for row, entry in enumerate(entries):
            label = captions(Entry(entry.labels[:1], [], 1, 1, True), 1, rng)
            for column, text in enumerate(captions(entry, VARIANTS, rng) + label):
                ids = [self.ids[word] for word in text if word in self.ids] or [UNKNOWN]
                phrases[row, column, : min(len(ids), PHRASE)] = torch.tensor(ids[:PHRASE])
                articles[row, column] = self.ids[_article(text[0] if text else "")]
        self.phrases, self.articles = phrases.to(self.device), articles.to(self.device)

    def _pick(self, weights: Tensor, size: int) -> Tensor:
        return torch.multinomial(weights, size, replacement=True)

    def _chance(self, size: int, probability: float) -> Tensor:
        return torch.rand(size, device=self.device) < probability

    def _constant(self, word: str, size: int) -> Tensor:
        return torch.full((size, 1), self.ids[word], device=self.device)

    def _words(self, names: list[str]) -> Tensor:
        return torch.tensor([self.ids[name] for name in names], device=self.device)

    def _tensor(self, values: list[float] | list[tuple[int, int, int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)
