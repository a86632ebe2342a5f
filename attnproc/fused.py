"""The prologue by fused kernels, where they can stand in for the composed parts.

What the parts are decides, never a class: norms of known formula, rotary forms of known layout,
plain tensors on a GPU. Everything else goes the composed way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels import triton
from .kernels.fusing import fusable, keeps_nothing
from .norms import Formula, Norms, formula
from .rotary import Rotary, Table, table_of
from .types import QKV, Streams

__all__ = ["Fused"]


@dataclass(slots=True)
class Fused:
    """Streams ``[B, S, H, D]`` that kernels are to norm, rotate and join.

    Methods of what compiled code makes itself, as this is, need no guards; functions do.
    """

    streams: Streams
    norms: Norms
    text_first: bool
    rotary: Rotary | None
    tables: tuple[Any, Any]

    def laid(self) -> QKV | None:
        """The joint sequence; None where no kernel can. Uses the streams up, unless it is None."""
        image, text, rotary = self.streams.image, self.streams.text, self.rotary
        if not fusable(image.q) or not self._takes(image, text):
            return None
        of_image = self._formulas(self.norms.image, image)
        of_text = self._formulas(self.norms.text, text)
        turned = (None, None) if rotary is None else self._turned(rotary)
        if of_image is None or of_text is None or turned is None:
            return None
        for one, other in zip(of_image, of_text, strict=True):
            if one is not None and other is not None and one.across != other.across:
                return None
        joint = rotary is not None and rotary.over == "joint"
        both = QKV(None, None, None)
        both.q = self._laid("q", of_image[0], of_text[0], turned[0], joint)
        both.k = self._laid("k", of_image[1], of_text[1], turned[1], joint)
        both.v = self._laid("v", None, None, None, joint)
        return both

    def _takes(self, image: QKV, text: QKV | None) -> bool:
        """Whether the tensors are of one kind."""
        first, others = image.q, [image.k, image.v]
        if text is not None:
            others += [text.q, text.k, text.v]
        for x in others:
            if x is not None and not (x.dtype == first.dtype and x.is_cuda == first.is_cuda):
                return False
        return True

    def _formulas(
        self, norms: tuple[Any, Any], stream: QKV | None
    ) -> tuple[Formula | None, Formula | None] | None:
        """Formulas of the norms of queries and keys; None where one has none."""
        if stream is None:
            return None, None
        if norms[0] is None and norms[1] is None:
            return None, None
        found: list[Formula | None] = []
        for norm, x in zip(norms, (stream.q, stream.k), strict=True):
            known = None
            if norm is not None and x is not None:
                known = formula(norm, x.shape[2], x.shape[3], x.dtype)
                if known is None:
                    return None
            found.append(known)
        return found[0], found[1]

    def _turned(self, rotary: Rotary) -> tuple[Table | None, Table | None] | None:
        """Rotary tables of queries and keys; None where one does not fit the kernels."""
        of_queries, of_keys = self.tables
        image, text, over = self.streams.image, self.streams.text, rotary.over
        found = None if of_queries is None else table_of(rotary.form, of_queries)
        if of_queries is not None and (found is None or not self._fits(found, "q", over)):
            return None
        if of_keys is None:
            return found, None
        if image.k is None:
            return None
        # Compiled code can't compare tables by identity; keys have another one only of their own.
        other = None if rotary.keys == "own" else found
        if other is None:
            other = table_of(rotary.form, of_keys)
        elif image.q.shape == image.k.shape and (text is None or over == "image"):
            # What fits queries fits keys that are alike.
            return found, other
        return (found, other) if other is not None and self._fits(other, "k", over) else None

    def _fits(self, table: Table, name: str, over: str) -> bool:
        """Whether a table has an entry for each token, of tensors that need no gradient."""
        text = self.streams.text
        x = getattr(self.streams.image, name)
        if x is None:
            return False
        more = None if text is None or over == "image" else getattr(text, name)
        tokens = x.shape[1] + (0 if more is None else more.shape[1])
        batch, positions, heads, entries = table.cos.shape
        return (
            table.cos.shape == table.sin.shape
            and batch in (1, x.shape[0])
            and positions == tokens
            and heads in (1, x.shape[2])
            and entries * table.step == table.turned <= x.shape[3]
            and table.turned % table.width == 0
            and (table.width > 2 or table.turned == x.shape[3])
            and not (table.cos.requires_grad or table.sin.requires_grad)
        )

    def _laid(
        self,
        name: str,
        of_image: Formula | None,
        of_text: Formula | None,
        table: Table | None,
        joint: bool,
    ) -> Tensor | None:
        """Queries, keys or values of both streams, by the kernel where anything is to do."""
        x, then = self.streams.take(name)
        one, other = of_image, of_text
        turns = (table is not None, table is not None and joint)
        if x is None or (then is not None and self.text_first):
            x, then, one, other, turns = then, x, of_text, of_image, (turns[1], turns[0])
        if x is None:
            return None
        if one is None and table is None and other is None:
            if then is None:
                return x
            # torch's own join is as fast for whole tensors, and gives gradients as views.
            if not keeps_nothing() or x.is_contiguous():
                return torch.cat((x, then), dim=1)
        home = triton.lay
        none = 0, 0.0, False, None, None
        n0, e0, a0, w0, b0 = none if one is None else self._numbers(one)
        n1, e1, a1, w1, b1 = none if other is None else self._numbers(other)
        shape = (2, 0, 1) if table is None else (table.width, table.turned, table.step)
        how = home.Lay((n0, n1), (e0, e1), a0 or a1, turns, joint and table is not None, *shape)
        angles = None if table is None else (table.cos, table.sin)
        return home.lay(x, then, how, (w0, b0, w1, b1), angles)

    def _numbers(self, norm: Formula) -> tuple[int, float, bool, Tensor | None, Tensor | None]:
        return norm.number, norm.eps, norm.across, norm.weight, norm.bias
