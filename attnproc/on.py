"""The verbs on a whole model: on chosen layers at once, with snapshots."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from . import layouts
from .interop import processors, put, swap
from .processor import Processor
from .prompts import Scale
from .schedules import Clock, Schedule, Weight
from .steering import Alignment, Region
from .steering.strength import Strength
from .types import AroundPart

__all__ = ["Layers", "Snapshot", "on"]

Kind = Literal["self", "cross", "joint"]
ByLayer = Strength | Mapping[str, Strength]

_WORDS: tuple[Kind, ...] = ("cross", "joint")
_ALL: tuple[Kind, ...] = ("self", "cross", "joint")

_ENCODERS = ("encoder_hid_proj.", "image_proj.")
_JOINT = {
    layouts.added_kv,
    layouts.joint,
    layouts.joint_packed,
    layouts.shared,
    layouts.shared_packed,
}


def on(
    model: nn.Module,
    layers: str = "*",
    *,
    kind: Kind | None = None,
    depth: int | None = None,
    resolution: int | None = None,
) -> Layers:
    """Chosen attention layers of a model, for the verbs.

    Processors of diffusers are swapped for ours first (`attnproc.swap`).

    Args:
        model: A model of diffusers or one of our modules.
        layers: Pattern of the layers' paths, such as ``up_blocks.*attn2``.
        kind: "self", "cross", or "joint" for text and image in one sequence.
        depth: In a U-Net how many times the grid was halved, elsewhere the index of the block.
        resolution: Height of a U-Net's grid in latent pixels, at the sample size of its config.

    Raises:
        ValueError: No layer fits; the message lists those that there are.
    """
    swap(model)
    chosen = Layers(model, layers, kind, depth, resolution)
    if not chosen.layers():
        paths = ", ".join(path for path, _ in processors(model)) or "none"
        raise ValueError(f"layers: none fits {chosen.choice()}; there are {paths}")
    return chosen


@dataclass(frozen=True, repr=False)
class Layers:
    """Chosen layers of a model; `attnproc.on` makes them.

    A verb puts changed processors into all of the layers, or into none if it fails for one.
    """

    model: nn.Module
    pattern: str = "*"
    kind: Kind | None = None
    depth: int | None = None
    resolution: int | None = None

    def __repr__(self) -> str:
        paths = [path for path, _ in self.layers()]
        return f"Layers({type(self.model).__name__}: {', '.join(paths)})"

    def layers(self) -> list[tuple[str, Any]]:
        """The chosen attention modules with their paths."""
        return [
            (path, attn)
            for path, attn in processors(self.model)
            if isinstance(attn.processor, Processor) and self._fits(path, attn)
        ]

    def with_lora(self, name: str, **options: Any) -> Layers:
        """See `Processor.with_lora`; `attn` is each layer's."""
        return self._each(lambda proc, attn: proc.with_lora(attn, name, **options))

    def with_custom_diffusion(self, **options: Any) -> Layers:
        """See `Processor.with_custom_diffusion`."""
        return self._each(lambda proc, attn: proc.with_custom_diffusion(attn, **options))

    def with_ip_adapter(
        self, width: int, num_tokens: int | Sequence[int] = 4, scale: Scale = 1.0, **options: Any
    ) -> Layers:
        """See `Processor.with_ip_adapter`."""
        return self._each(
            lambda proc, attn: proc.with_ip_adapter(attn, width, num_tokens, scale, **options)
        )

    def with_joint_ip_adapter(self, width: int, **options: Any) -> Layers:
        """See `Processor.with_joint_ip_adapter`."""
        return self._each(lambda proc, attn: proc.with_joint_ip_adapter(attn, width, **options))

    def with_pag(self, chunks: int = 2, *, strength: ByLayer = 1.0, **options: Any) -> Layers:
        """See `Processor.with_pag`, and `with_word_weights` here for `strength`."""
        return self._steered("with_pag", _ALL, strength, chunks, **options)

    def with_slicing(self, size: int) -> Layers:
        """See `Processor.with_slicing`."""
        return self._each(lambda proc, attn: proc.with_slicing(size))

    def with_cross_frame(self, batch_size: int, *, strength: ByLayer = 1.0) -> Layers:
        """See `Processor.with_cross_frame`, and `with_word_weights` here for `strength`."""
        return self._steered("with_cross_frame", _ALL, strength, batch_size)

    def with_capture(self, part: AroundPart) -> Layers:
        """See `Processor.with_capture`."""
        return self._each(lambda proc, attn: proc.with_capture(part))

    def with_backend(self, name: str | None) -> Layers:
        """See `Processor.with_backend`."""
        return self._each(lambda proc, attn: proc.with_backend(name))

    def without(self, name: str, *, missing: bool = False) -> Layers:
        """See `Processor.without`."""
        return self._each(lambda proc, attn: proc.without(name, missing=missing))

    def scale(self, name: str, weight: Weight | Scale) -> Layers:
        """Sets the weight of the low-rank updates of a name, or of the image prompts ("ip")."""
        return self._each(lambda proc, attn: proc.with_scale(name, weight))

    @property
    def clock(self) -> Clock:
        """The model's time; its `on_step_end` goes into a pipeline as `callback_on_step_end`."""
        return self.model.__dict__.setdefault("_attnproc_clock", Clock())

    def schedule(
        self,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
        shape: Callable[[float | Tensor], float | Tensor] | None = None,
    ) -> Schedule:
        """A weight that holds for a part of the steps, by the model's clock (`Schedule`)."""
        return Schedule(self.clock, weight, begin, end, shape)

    def with_text(self, tokens: int) -> Layers:
        """See `Processor.with_text`; for the layers of joint attention."""
        return self._each(
            lambda proc, attn: proc.with_text(tokens) if kind_of(attn) == "joint" else proc
        )

    def with_word_weights(
        self, weights: Mapping[int, float], *, strength: ByLayer = 1.0, **options: Any
    ) -> Layers:
        """See `Processor.with_word_weights`; for the layers that see the prompt.

        Args:
            weights: Token positions in the prompt, each with its factor.
            strength: One for all layers, or one each by patterns of paths: the first that matches
                holds, layers without one stay as they are.
            options: As there.
        """
        return self._steered("with_word_weights", _WORDS, strength, weights, **options)

    def with_regions(self, *regions: Region, strength: ByLayer = 1.0, **options: Any) -> Layers:
        """See `Processor.with_regions`, and `with_word_weights` here for `strength`."""
        return self._steered("with_regions", _WORDS, strength, *regions, **options)

    def with_prompt_to_prompt(
        self,
        alignment: Alignment,
        *,
        strength: ByLayer = 1.0,
        self_strength: ByLayer = 0.0,
        **options: Any,
    ) -> Layers:
        """See `Processor.with_prompt_to_prompt`.

        Args:
            alignment: The prompts' tokens (`attnproc.steering.align`).
            strength: Of the layers that see the prompt; see `with_word_weights`.
            self_strength: Of self attention, which keeps shapes more than layout.
            options: As there.
        """
        verb = "with_prompt_to_prompt"
        self._steered(verb, _WORDS, strength, alignment, **options)
        return self._steered(verb, ("self",), self_strength, **options)

    def with_reference(self, *, strength: ByLayer = 1.0, **options: Any) -> Layers:
        """See `Processor.with_reference`, and `with_word_weights` here for `strength`."""
        return self._steered("with_reference", ("self", "joint"), strength, **options)

    def describe(self) -> str:
        """The parts of the layers; alike layers in one block."""
        blocks: dict[str, list[str]] = {}
        for path, attn in self.layers():
            blocks.setdefault(attn.processor.describe(), []).append(path)
        return "\n\n".join("\n".join((*paths, parts)) for parts, paths in blocks.items())

    def snapshot(self) -> Snapshot:
        """What `restore` goes back to: processors, their settings and their weights."""
        return Snapshot(tuple(_Saved.of(attn) for _, attn in self.layers()))

    def _each(self, change: Callable[[Processor, nn.Module], Processor]) -> Layers:
        changed = [(attn, change(attn.processor, attn)) for _, attn in self.layers()]
        for attn, processor in changed:
            put(attn, processor)
        return self

    def _steered(
        self, verb: str, kinds: Collection[Kind], strength: ByLayer, *args: Any, **options: Any
    ) -> Layers:
        """Puts a part into the layers of some kinds, each with its strength."""
        changed = [
            (attn, getattr(attn.processor, verb)(*args, strength=here, **options))
            for path, attn in self.layers()
            if kind_of(attn) in kinds and (here := _strength_of(strength, path)) is not None
        ]
        for attn, processor in changed:
            put(attn, processor)
        return self

    def _fits(self, path: str, attn: Any) -> bool:
        # Image encoders that diffusers hangs into a model are no layers of it, unless named.
        encoder = path.startswith(_ENCODERS) and not self.pattern.startswith(_ENCODERS)
        return (
            not encoder
            and fnmatch.fnmatchcase(path, self.pattern)
            and self.kind in (None, kind_of(attn))
            and self.depth in (None, depth_of(self.model, path))
            and self.resolution in (None, resolution_of(self.model, path))
        )

    def choice(self) -> str:
        """What was chosen by, in words."""
        chosen = (f"{name}={value!r}" for name, value in list(vars(self).items())[1:] if value)
        return ", ".join(chosen)


def _strength_of(strength: ByLayer, path: str) -> Strength | None:
    """The strength of a layer; None where patterns were given and none matches."""
    if not isinstance(strength, Mapping):
        return strength
    found = (s for pattern, s in strength.items() if fnmatch.fnmatchcase(path, pattern))
    return next(found, None)


def kind_of(attn: Any) -> Kind:
    """Whether a layer with one of our processors is self, cross or joint attention."""
    if getattr(attn.processor, "recipe", None) and attn.processor.recipe.project in _JOINT:
        return "joint"
    return "cross" if getattr(attn, "is_cross_attention", False) else "self"


def depth_of(model: nn.Module, path: str) -> int | None:
    """How often the grid was halved before a layer of a U-Net, or the index of its block."""
    block, _, rest = path.partition(".")
    downs = len(getattr(model, "down_blocks", ()))
    if downs and block == "mid_block":
        return downs - 1
    index = re.match(r"\d+", rest)
    if index is None:
        return None
    return downs - 1 - int(index[0]) if block == "up_blocks" else int(index[0])


def resolution_of(model: nn.Module, path: str) -> int | None:
    """Height of a U-Net layer's grid at the sample size of the model's config."""
    depth, size = depth_of(model, path), getattr(getattr(model, "config", None), "sample_size", 0)
    if depth is None or not size or not hasattr(model, "down_blocks"):
        return None
    return (size if isinstance(size, int) else size[0]) >> depth


@dataclass(frozen=True)
class _Saved:
    attn: Any
    processor: Processor
    state: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, attn: Any) -> _Saved:
        processor = attn.processor
        state = {key: _shallow(value) for key, value in vars(processor).items()}
        weights = {key: value.detach().clone() for key, value in _weights(processor).items()}
        return cls(attn, processor, state, weights)

    def restore(self) -> None:
        self.processor.__dict__.clear()
        self.processor.__dict__.update({k: _shallow(v) for k, v in self.state.items()})
        for key, value in _weights(self.processor).items():
            value.data = self.weights[key].clone()
        put(self.attn, self.processor)


@dataclass(frozen=True)
class Snapshot:
    """Processors of some layers as they were; `restore` makes it so again, to the bit."""

    saved: tuple[_Saved, ...]

    def restore(self) -> None:
        """Puts the processors back with their settings, weights, devices and dtypes."""
        for layer in self.saved:
            layer.restore()


def _weights(processor: Any) -> dict[str, Tensor]:
    """The parameters and buffers themselves."""
    return processor.state_dict(keep_vars=True) if isinstance(processor, nn.Module) else {}


def _shallow(value: Any) -> Any:
    return type(value)(value) if isinstance(value, dict | list) else value
