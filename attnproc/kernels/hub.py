"""Kernels of the Hugging Face hub, by the `kernels` package: only at a revision that was named.

A kernel is code: until `use_hub` is told which revision to trust, the names only explain this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..types import Scoring
from .base import Kernel, package
from .flash import FLASH2, FLASH3, FLASH4, flash, flash_lse
from .plan import forget
from .reference import factor
from .sage import SAGE
from .takes import Ask

__all__ = ["HUB", "HubLibrary", "use_hub"]

_INSTALL = "pip install kernels"


@dataclass(frozen=True)
class HubLibrary:
    """A repository of the hub at one revision.

    Args:
        repo: Its name.
        revision: A commit, tag or branch; None is not decided.
        unlimited: How it writes a window without limit.
        wants_lse: The argument that asks for the log-sum-exp.
    """

    repo: str
    revision: str | None = None
    unlimited: int | None = -1
    wants_lse: str = "return_attn_probs"

    def load(self) -> Any:
        """Fetches it at its revision, or takes what was fetched before."""
        revision = _CHOSEN.get(self.repo, self.revision)
        if revision is None:
            raise ImportError(_undecided(self.repo))
        if (self.repo, revision) not in _LOADED:
            kernels = package("kernels", _INSTALL)
            _LOADED[self.repo, revision] = kernels.get_kernel(self.repo, revision=revision)
        return _LOADED[self.repo, revision]


_CHOSEN: dict[str, str] = {}
_LOADED: dict[tuple[str, str], Any] = {}


def use_hub(name: str, revision: str) -> None:
    """Allows a kernel of the hub to be fetched, at this revision alone, when it is first used.

    Args:
        name: `"flash_hub"`, `"flash3_hub"`, `"flash4_hub"`, `"sage_hub"`,
            `"sage_blackwell_hub"`, `"aiter_fa2_hub"` or diffusers' names of these.
        revision: A commit (best), tag or branch of its repository.

    Raises:
        ValueError: No kernel of the hub has that name.
    """
    from .base import named

    kernel = named(name)
    if kernel not in HUB:
        have = ", ".join(k.name for k in HUB)
        raise ValueError(f"name is {name!r}: kernels of the hub are {have}")
    _CHOSEN[kernel.options[0].repo] = revision
    forget()


def hub_sage(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, library: HubLibrary) -> Tensor:
    """SageAttention from the hub."""
    scale = factor(q, scoring)
    run = library.load().sageattn
    return run(q, k, v, tensor_layout="HND", is_causal=scoring.causal, sm_scale=scale)


def hub_sage3(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, library: HubLibrary) -> Tensor:
    """SageAttention 3 from the hub, for Blackwell.

    Source: https://arxiv.org/abs/2505.11594
    """
    if scoring.scale is not None:
        # It has no argument for the scale.
        q = q * (scoring.scale * q.shape[-1] ** 0.5)
    # It writes to the keys that it gets.
    return library.load().sageattn3_blackwell(q, k.clone(), v, is_causal=scoring.causal)


def _undecided(repo: str) -> str:
    return (
        f"the hub's {repo} is not fetched on its own: name the revision to trust by "
        "attnproc.kernels.use_hub(name, revision=...)"
    )


@dataclass(frozen=True)
class _Decided:
    """The further condition that a revision was named."""

    repo: str
    inner: Any

    def __call__(self, asked: Ask) -> str | None:
        undecided = _undecided(self.repo) if self.repo not in _CHOSEN else None
        return undecided or (self.inner(asked) if self.inner else None)


def _hub(
    name: str, library: HubLibrary, like: Kernel, run: Any = hub_sage, **changes: Any
) -> Kernel:
    takes = replace(
        like.takes,
        needs="kernels",
        install=_INSTALL,
        also=_Decided(library.repo, like.takes.also),
    )
    if like.run is flash:
        takes = replace(takes, **changes)
        return Kernel(name, flash, (library,), takes=takes, with_lse=flash_lse)
    return Kernel(name, run, (library,), takes=replace(takes, lse=False, **changes))


HUB = (
    _hub("flash_hub", HubLibrary("kernels-community/flash-attn2"), FLASH2),
    _hub("flash3_hub", HubLibrary("kernels-community/flash-attn3"), FLASH3),
    _hub(
        "flash4_hub",
        HubLibrary("kernels-community/flash-attn4", None, None, "return_lse"),
        FLASH4,
    ),
    # Of AITER's kernels it has the forward ones in bfloat16.
    _hub(
        "aiter_fa2_hub",
        HubLibrary("kernels-community/aiter-flash-attn-ck", wants_lse="return_lse"),
        FLASH2,
        dtypes=(torch.bfloat16,),
        masks=frozenset({"causal", "window"}),
        backward=False,
    ),
    _hub("sage_hub", HubLibrary("SageAttention/sage-attention"), SAGE[0]),
    _hub(
        "sage_blackwell_hub",
        HubLibrary("SageAttention/sage-blackwell"),
        SAGE[0],
        hub_sage3,
        dims=(64, 128, 64),
        gqa=False,
    ),
)
