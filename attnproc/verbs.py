"""The verbs: a processor with one part more, or without one.

Each gives a copy that shares the weights there are; nothing is changed in place. Parts act at
seams of their own (projections, edits, wrappers, prompts), so verbs of different seams commute.
Where one seam holds several, the order is fixed whatever the order of the verbs: custom
projections replace before low-rank updates add; what steers wraps capture, which wraps
perturbation, which wraps slicing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from .edits import FirstFrame, detach_first_token
from .guidance import BlurredMap
from .kernels import named
from .kernels.around import Perturbed, Sliced, identity
from .linears import PROJECTIONS, CustomDiffusion, LoRA, mount_custom_diffusion, mount_lora, widths
from .prompts import Scale, decoupled, joint_decoupled, mount_joint_prompt, mount_prompts
from .schedules import Schedule, Weight
from .steering import (
    Alignment,
    Fading,
    PromptToPrompt,
    Region,
    Regional,
    SharedKeys,
    TextBefore,
    WordWeights,
)
from .steering.strength import Strength
from .types import AroundPart, Recipe

if TYPE_CHECKING:
    from .processor import Processor

__all__ = ["Verbs"]

# The outermost wrapper first; unknown ones stand before them all.
_AROUND = ("text", "reference", "regions", "prompt_to_prompt", "capture", "pag", "slicing")
_NAMES = {decoupled: "ip", joint_decoupled: "ip", detach_first_token: "custom_diffusion"}


def name_of(part: Any) -> str | None:
    """What `without` calls a part; None for the parts of a plain processor."""
    return _NAMES[part] if part in _NAMES else getattr(part, "name", None)


class Verbs:
    """What a processor can be given and what can be taken off again."""

    if TYPE_CHECKING:
        recipe: Recipe
        lora_weights: Mapping[str, Weight]
        but: Callable[..., Processor]

        def __getattr__(self, name: str) -> Any: ...

    def with_lora(
        self,
        attn: Any,
        name: str,
        *,
        rank: int = 4,
        alpha: float | None = None,
        weight: Weight = 1.0,
        projections: Iterable[str] = PROJECTIONS,
    ) -> Processor:
        """With low-rank updates of the projections of `attn`.

        Args:
            attn: The attention module, whose widths they take.
            name: What the updates are called; their state keys are ``{projection}_{name}_lora``.
            rank: Width between the two layers of an update.
            alpha: The factor is ``alpha / rank``; None is a factor of 1.
            weight: A further factor, also a tensor or a `Schedule`.
            projections: Which of the module's projections are updated.

        Raises:
            ValueError: There is such a name already, or no such projection.
        """
        proc = self._new(name)
        found = widths(attn, projections)
        if not found:
            raise ValueError(
                f"projections {tuple(projections)}: the module has none of them, possible are "
                f"{tuple(widths(attn))}"
            )
        proc.__dict__["lora_weights"] = {**proc.lora_weights, name: weight}
        mount_lora(proc, found, rank, alpha, name)
        return _settled(proc.but(linears=(*proc.recipe.linears, LoRA(name))), self, attn)

    def with_custom_diffusion(
        self,
        attn: Any,
        *,
        train_kv: bool = True,
        train_q_out: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> Processor:
        """With projections of its own in place of those of `attn` (Custom Diffusion).

        Raises:
            ValueError: It has them already.
        """
        proc = self._new("custom_diffusion")
        proc.__dict__.update(train_kv=train_kv, train_q_out=train_q_out)
        mount_custom_diffusion(proc, widths(attn), out_bias, dropout)
        recipe = proc.recipe
        changed = proc.but(
            linears=(CustomDiffusion(), *recipe.linears),
            edits=(*recipe.edits, detach_first_token),
        )
        return _settled(changed, self, attn)

    def with_ip_adapter(
        self,
        attn: Any,
        width: int,
        num_tokens: int | Sequence[int] = 4,
        scale: Scale = 1.0,
        *,
        bias: bool = False,
    ) -> Processor:
        """With one or several decoupled image prompts, after those that it has.

        Args:
            attn: The attention module, whose width the projections take.
            width: Width of the prompts' states.
            num_tokens: Tokens of each prompt.
            scale: Weight of each prompt; numbers, tensors or schedules.
            bias: Whether the projections have a bias, as Flux' have.

        Raises:
            ValueError: It has an image prompt of another kind.
        """
        self._check_prompt(decoupled)
        proc = self.but()
        hidden = widths(attn)["to_q"][1]
        mount_prompts(proc, hidden, width, num_tokens, scale, bias=bias)
        if decoupled in self.recipe.prompts:
            _extend_prompts(proc, cast("Processor", self))
        return _settled(proc.but(prompts=(decoupled,)), self, attn)

    def with_joint_ip_adapter(
        self, attn: Any, width: int, temb_width: int = 1280, scale: Weight = 0.5
    ) -> Processor:
        """With SD3's image prompt, under norms of its own.

        Args:
            attn: The joint attention module.
            width: Width of the prompt's states.
            temb_width: Width of the timestep embedding.
            scale: Weight of the prompt.

        Raises:
            ValueError: It has an image prompt already.
        """
        proc = self._new("ip")
        hidden = widths(attn)["to_q"][1]
        mount_joint_prompt(proc, hidden, width, hidden // attn.heads, temb_width, scale)
        return _settled(proc.but(prompts=(joint_decoupled,)), self, attn)

    def with_pag(
        self,
        chunks: int = 2,
        *,
        blur: float | None = None,
        perturb: AroundPart | None = None,
        strength: Strength = 1.0,
    ) -> Processor:
        """With perturbed-attention guidance.

        Args:
            chunks: 2 for (plain, perturbed), 3 for (unconditional, conditional, perturbed) rows.
            blur: Standard deviation in tokens of a blur of the map; None is the identity map.
            perturb: Other attention of the perturbed rows, as `attnproc.steering` has.
            strength: From 0, no perturbation, to 1; also a tensor or a `Schedule`.

        Raises:
            ValueError: It has it already.
        """
        if chunks not in (2, 3):
            raise ValueError(f"chunks is {chunks}, possible are 2 and 3")
        perturb = perturb or (identity if blur is None else BlurredMap(blur))
        if isinstance(strength, Tensor | Schedule) or strength != 1:
            perturb = Fading(perturb, strength)
        return self._new("pag")._around(Perturbed(chunks, perturb))

    def with_slicing(self, size: int) -> Processor:
        """With attention a few heads at a time; another size takes the place of the old one."""
        if size < 1:
            raise ValueError(f"size is {size}, possible are numbers of heads from 1 on")
        return self.without("slicing", missing=True)._around(Sliced(size))

    def with_cross_frame(self, batch_size: int, *, strength: Strength = 1.0) -> Processor:
        """With the first frame's keys and values for every frame of `batch_size` videos.

        Args:
            batch_size: How many videos the batch holds.
            strength: From 0, their own, to 1; also a tensor or a `Schedule`.
        """
        proc = self._new("cross_frame")
        return proc.but(edits=(FirstFrame(batch_size, strength), *proc.recipe.edits))

    def with_capture(self, part: AroundPart) -> Processor:
        """With a wrapper that records maps (`attnproc.capture`)."""
        return self._new("capture")._around(part)

    def with_backend(self, name: str | None) -> Processor:
        """With another kernel, by a name of ours or of diffusers; None is the recipe's own.

        Raises:
            ValueError: No kernel has that name.
        """
        if name is not None:
            named(name)
        proc = self.but()
        proc.__dict__["_attention_backend"] = name
        return proc

    def with_scale(self, name: str, weight: Weight | Scale) -> Processor:
        """With another weight of the low-rank updates of a name, or of the image prompts ("ip").

        Raises:
            ValueError: Nothing of that name has a weight.
        """
        proc = self.but()
        if LoRA(name) in self.recipe.linears:
            proc.__dict__["lora_weights"] = {**self.lora_weights, name: weight}
        elif decoupled in self.recipe.prompts and name == "ip":
            count = len(self.to_k_ip)
            scales: list[Any] = (
                list(weight) if isinstance(weight, list | tuple) else [weight] * count
            )
            if len(scales) != count:
                raise ValueError(f"weight has {len(scales)} entries for {count} image prompts")
            proc.__dict__["scale"] = scales
        elif joint_decoupled in self.recipe.prompts and name == "ip":
            proc.__dict__["scale"] = weight
        else:
            raise ValueError(f"name {name!r} has no weight; there are {self.names()}")
        return proc

    def without(self, name: str, *, missing: bool = False) -> Processor:
        """Without what the verbs or its class gave it under a name.

        Args:
            name: The name of a low-rank update, or "ip", "custom_diffusion", "pag", "slicing",
                "cross_frame", "capture", "words", "regions", "prompt_to_prompt", "reference",
                "backend".
            missing: Whether it is no error that there is none.

        Raises:
            ValueError: Nothing has that name.
        """
        if name == "backend":
            return self.with_backend(None)
        if name not in self.names() and not missing:
            raise ValueError(f"name {name!r}: there is no such part, there are {self.names()}")
        fields = ("linears", "edits", "around", "prompts")
        kept = {
            field: tuple(p for p in getattr(self.recipe, field) if name_of(p) != name)
            for field in fields
        }
        proc = self.but(**kept)
        if name == "ip":
            proc.__dict__.update(scale=[], num_tokens=[])
        suffix = f"_{LoRA(name).suffix}" if LoRA(name) in self.recipe.linears else f"_{name}"
        for child, _ in _children(proc):
            if child.endswith(suffix) or _is_prompt(child, name):
                delattr(proc, child)
        return proc

    def with_word_weights(self, weights: Mapping[int, float], **options: Any) -> Processor:
        """With words that say more, less, or the opposite.

        Args:
            weights: Token positions in the prompt, each with its factor.
            options: See `attnproc.steering.WordWeights`.

        Raises:
            ValueError: It has some already.
        """
        part = WordWeights(tuple(sorted(weights.items())), **options)
        proc = self._new("words")
        return proc.but(edits=(*proc.recipe.edits, part))

    def with_text(self, tokens: int) -> Processor:
        """With the knowledge that the sequence begins with a text, as in Flux's single blocks.

        Args:
            tokens: How many tokens it has.

        Raises:
            ValueError: It has that already.
        """
        return self._new("text")._around(TextBefore(tokens))

    def with_regions(self, *regions: Region, **options: Any) -> Processor:
        """With words that are seen by their part of the picture alone.

        Args:
            regions: Tokens of the prompt, and where they are seen.
            options: See `attnproc.steering.Regional`.

        Raises:
            ValueError: It has some already.
        """
        return self._new("regions")._around(Regional(regions, **options))

    def with_prompt_to_prompt(
        self, alignment: Alignment | None = None, **options: Any
    ) -> Processor:
        """With the first picture's attention maps for the others of a batch.

        Args:
            alignment: The prompts' tokens (`attnproc.steering.align`); None in self attention.
            options: See `attnproc.steering.PromptToPrompt`.

        Raises:
            ValueError: It has it already.
        """
        return self._new("prompt_to_prompt")._around(PromptToPrompt(alignment, **options))

    def with_reference(self, **options: Any) -> Processor:
        """With the first picture's keys and values for the others of a batch.

        Args:
            options: See `attnproc.steering.SharedKeys`.

        Raises:
            ValueError: It has it already.
        """
        return self._new("reference")._around(SharedKeys(**options))

    def names(self) -> tuple[str, ...]:
        """The names of the parts that `without` can take off."""
        recipe = self.recipe
        parts = (*recipe.linears, *recipe.edits, *recipe.around, *recipe.prompts)
        return tuple(dict.fromkeys(n for n in map(name_of, parts) if n is not None))

    def _new(self, name: str) -> Processor:
        """A copy that may be given a part of that name."""
        if not name.isidentifier() or name in ("backend", "norm"):
            raise ValueError(f"name is {name!r}, possible are identifiers but 'backend', 'norm'")
        if name in self.names():
            raise ValueError(f"name {name!r}: there is such a part already; take it off first")
        return self.but()

    def _check_prompt(self, kind: Any) -> None:
        other = [p for p in self.recipe.prompts if p is not kind]
        if other:
            raise ValueError(
                f"the image prompt {other[0].__name__} shares weight names with {kind.__name__}: "
                "take it off first"
            )

    def _around(self, part: AroundPart) -> Processor:
        parts = (*self.recipe.around, part)
        return self.but(around=tuple(sorted(parts, key=_rank)))


def _rank(part: AroundPart) -> int:
    name = name_of(part)
    return _AROUND.index(name) if name in _AROUND else -1


def _children(proc: Processor) -> list[tuple[str, nn.Module]]:
    return list(proc.named_children()) if isinstance(proc, nn.Module) else []


def _is_prompt(child: str, name: str) -> bool:
    return name == "ip" and child in ("norm_ip", "norm_q", "norm_k", "norm_ip_k")


def _extend_prompts(proc: Processor, old: Processor) -> None:
    """Puts the prompts of `old` before the new ones."""
    for name in ("to_k_ip", "to_v_ip"):
        setattr(proc, name, nn.ModuleList([*getattr(old, name), *getattr(proc, name)]))
    scale, tokens = [*old.scale, *proc.scale], [*old.num_tokens, *proc.num_tokens]
    proc.__dict__.update(scale=scale, num_tokens=tokens)


def _settled(proc: Processor, old: Verbs, attn: Any) -> Processor:
    """`proc` with the weights that `old` lacks on the device and in the dtype of `attn`."""
    weight = attn.to_q.weight
    dtype = weight.dtype if weight.is_floating_point() else None
    for name, child in _children(proc):
        if getattr(old, name, None) is not child:
            child.to(device=weight.device, dtype=dtype)
    return proc
