"""What flows through the line: tensors in records, parts as plain callables, and the recipe.

Letters: ``B`` batch, ``S`` tokens of a stream, ``H`` heads, ``D`` channels a head, ``Q``/``K``
queries/keys of the joint sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, is_grad_enabled, nn

from .tracing import constant

if TYPE_CHECKING:
    from .kernels import Kernel
    from .norms import Norms
    from .processor import Processor
    from .rotary import Rotary

__all__ = [
    "QKV",
    "All",
    "Arranged",
    "Bias",
    "Blocks",
    "Branch",
    "Call",
    "Causal",
    "Keys",
    "Mask",
    "MaskKind",
    "MaskMod",
    "Positional",
    "Recipe",
    "Scoring",
    "Site",
    "Streams",
    "Window",
    "both",
]


@dataclass(slots=True)
class QKV:
    """Queries, keys and values of one stream, ``[B, S, H*D]`` or, split, ``[B, S, H, D]``.

    Each is a tensor, or None in a stream that lacks queries (added keys and values) or keys and
    values (only cross attention). The steps of the prologue overwrite them, so that a large tensor
    lives no longer than its next form.
    """

    q: Any
    k: Any
    v: Any

    @property
    def alike(self) -> bool:
        """Whether queries, keys and values are all there, and of one dtype."""
        q, k, v = self.q, self.k, self.v
        if q is None or k is None or v is None:
            return False
        return q.dtype == k.dtype == v.dtype

    def split(self, dim: int) -> None:
        """``[B, S, H*D]`` to ``[B, S, H, D]``; what is split already stays.

        Keys and values may have fewer heads than queries.
        """
        q, k, v = self.q, self.k, self.v
        if q is not None and q.ndim == 3:
            batch, tokens, channels = q.shape
            self.q = q.view(batch, tokens, channels // dim, dim)
        if k is not None and k.ndim == 3:
            batch, tokens, channels = k.shape
            self.k = k.view(batch, tokens, channels // dim, dim)
        if v is not None and v.ndim == 3:
            batch, tokens, channels = v.shape
            self.v = v.view(batch, tokens, channels // dim, dim)

    def tokens(self, span: slice) -> QKV:
        """Some of the tokens, as views."""
        return QKV(self.q[:, span], self.k[:, span], self.v[:, span])


class _Record:
    """Base of what flows: nothing changes it in place, `but` makes a changed copy.

    Not a named tuple, of each of which compiled code checks a dozen things before every call.
    """

    __slots__ = ()

    def but(self: _R, **changes: Any) -> _R:
        """A copy with some fields changed."""
        kept = {name: getattr(self, name) for name in self.__slots__}
        return type(self)(**{**kept, **changes})


_R = TypeVar("_R", bound=_Record)
_NO_MODULES: dict[str, Any] = {}


@dataclass(slots=True)
class Streams(_Record):
    """The image (or only) stream and, in joint attention, the text stream."""

    image: QKV
    text: QKV | None = None

    def take(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """A tensor of the image and of the text, out of the streams."""
        image, text, then = self.image, self.text, None
        x = getattr(image, name)
        setattr(image, name, None)
        if text is not None:
            then = getattr(text, name)
            setattr(text, name, None)
        return x, then

    def join(self, text_first: bool) -> QKV:
        """One sequence of both, along the token axis of ``[B, S, H, D]``, using them up."""
        if self.text is None:
            return self.image
        both = QKV(None, None, None)
        both.q = self._joined("q", text_first)
        both.k = self._joined("k", text_first)
        both.v = self._joined("v", text_first)
        return both

    def _joined(self, name: str, text_first: bool) -> Tensor | None:
        image, text = self.take(name)
        if image is None or text is None:
            return text if image is None else image
        first, last = (text, image) if text_first else (image, text)
        # On a CPU the output lies as queries do, and is to be tokens; keys and values are read
        # faster where the tokens of a head lie side by side.
        if name == "q" or not first.is_cpu:
            return torch.cat((first, last), dim=1)
        return torch.cat((first.transpose(1, 2), last.transpose(1, 2)), dim=2).transpose(1, 2)


@dataclass(slots=True)
class Call(_Record):
    """The arguments of one processor call, under one name each whatever the caller calls them."""

    x: Tensor
    """``[B, S, C]`` or a grid ``[B, C, height, width]``."""
    context: Tensor | None = None
    """``[B, T, C']``; a grid is taken where the family takes one."""
    mask: Tensor | MaskKind | None = None
    temb: Tensor | None = None
    rope: Any = None
    key_rope: Any = None
    base_length: int | None = None
    ip_states: Sequence[Tensor] | Tensor | None = None
    ip_masks: Sequence[Tensor | None] | Tensor | None = None
    lora_scale: float | Tensor = 1.0


@dataclass(slots=True)
class Site(_Record):
    """Where a part stands: it looks up weights on `proc`, settings on `attn`, inputs in `call`."""

    recipe: Recipe
    proc: Processor
    attn: Any
    """Any module with the attributes that the parts look up: diffusers', ours, or a likeness."""
    call: Call
    compiling: bool = False
    """Whether `torch.compile` traces this: it makes kernels itself, and a guard for each look."""

    @property
    def keeps_nothing(self) -> bool:
        """Whether nothing is kept for gradients or a graph."""
        return not self.compiling and not is_grad_enabled()

    def linear(self, name: str, x: Tensor, y: Any = None) -> Tensor:
        """The projection `name` of `x` ``[B, S, C]``, or of its packed `y`, with adapters."""
        for part in self.recipe.linears:
            y = part(self, name, x, y)
        return y

    def products(self, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
        """The projections of one input, by one product where `attnproc.packing` keeps a matrix."""
        if not x.is_contiguous():
            # Tokens of a grid: each product would make its own copy.
            x = x.contiguous()
        packing = self.attn._modules.get("packing")
        if packing is None:
            return [self.linear(name, x) for name in names]
        parts = packing.products(self.attn, names, x)
        return [self.linear(name, x, part) for name, part in zip(names, parts, strict=True)]

    def mounted(self, name: str) -> Any:
        """A layer of the processor, as adapters have them; None where it has none."""
        # As in `held`: to say that it has not got one takes a module as long as a launch.
        return self.proc.__dict__.get("_modules", _NO_MODULES).get(name)

    def held(self, name: str) -> Any:
        """A layer of the attention module; None where it has none."""
        # Straight from the registry: asking the module costs a failed look-up first.
        own = self.attn.__dict__
        if not self.compiling and name in own:
            return own[name]
        layer = own.get("_modules", _NO_MODULES).get(name)
        if layer is not None:
            return layer
        if self.compiling and not _finds(type(self.attn), name):
            # A layer that comes later is noticed by the registry.
            return own.get(name)
        return self.setting(name, None)

    def setting(self, name: str, default: Any) -> Any:
        """What the attention module says of itself, or the default where it says nothing."""
        attn = self.attn
        if self.compiling:
            # By nothing else would compiled code notice a setting that comes later.
            return getattr(attn, name, default)
        own = attn.__dict__
        if name in own:
            return own[name]
        # To say that it has not got something takes a module as long as a launch.
        for registry in ("_parameters", "_buffers", "_modules"):
            if name in own.get(registry, _NO_MODULES):
                return own[registry][name]
        return getattr(attn, name, default) if _finds(type(attn), name) else default


@constant
def _finds(kind: type, name: str) -> bool:
    """Whether objects of a class may have an attribute that is in none of their registries."""
    return hasattr(kind, name) or getattr(kind, "__getattr__", None) is not nn.Module.__getattr__


@dataclass(slots=True)
class Arranged(_Record):
    """What the prologue hands to the kernel, and what image prompts need of it."""

    q: Tensor
    """``[B, H, Q, D]``."""
    k: Tensor
    """``[B, H', K, D]`` with ``H'`` dividing ``H``; so is `v`."""
    v: Tensor
    length: int
    """How many of the queries are the image's."""
    text_keys: int
    """How many of the keys are text that was joined to the image."""
    raw: QKV | None = None
    """For image prompts: the image stream ``[B, S, H, D]`` before norms and rotary embedding; None
    where there are none of either, and no text was joined."""

    def image(self, text_first: bool) -> tuple[int, int] | None:
        """Where the image stands among the queries: start and stop; None without a text."""
        total = self.q.shape[2]
        text = total - self.length
        if text <= 0:
            return None
        return (text, total) if text_first else (0, self.length)

    def image_keys(self, text_first: bool) -> tuple[int, int] | None:
        """Where the image stands among the keys; None without a text."""
        text = self.text_keys
        if text <= 0:
            return None
        total = self.k.shape[2]
        return (text, total) if text_first else (0, total - text)


class Keys(NamedTuple):
    """A mask over keys: ``valid`` is bool ``[B|1, K]``, true where a key may be attended to.

    `within` is where alone it may be false, start and stop; None if that is not known.
    """

    valid: Tensor
    within: tuple[int, int] | None = None

    @classmethod
    def first(cls, lengths: Tensor, keys: int) -> Keys:
        """Of ``keys`` keys the first ``lengths`` ``[B]`` are valid: padding at the end."""
        return cls(torch.arange(keys, device=lengths.device) < lengths[:, None])

    def __and__(self, other: MaskKind) -> All:
        return both(self, other)


class Bias(NamedTuple):
    """A mask ``[B|1, H|1, Q|1, K]``: bool means "attend", float is added to the scores."""

    values: Tensor

    def __and__(self, other: MaskKind) -> All:
        return both(self, other)


class _Structure:
    """What masks by position alone have in common."""

    def __and__(self, other: MaskKind) -> All:
        return both(cast("MaskKind", self), other)


@dataclass(frozen=True)
class Causal(_Structure):
    """Query i sees keys 0 to i, both counted from the start."""


@dataclass(frozen=True)
class Window(_Structure):
    """Query i sees keys i - left to i + right; None is no limit on that side."""

    left: int | None
    right: int | None


@dataclass(frozen=True)
class Blocks(_Structure):
    """What a function of positions says, as in FlexAttention: blocks, regions, documents.

    Args:
        mod: (batch, head, query, key) -> bool, on integer tensors that broadcast; true means
            "attend". It is called again whenever a mask is made of it, so it has no side effects;
            a module-level function or a frozen dataclass makes that happen once a shape.
    """

    mod: MaskMod


@dataclass(frozen=True)
class All(_Structure):
    """Several masks at once: a key is seen where each of them shows it; biases add up."""

    parts: tuple[MaskKind, ...]


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Positional:
    """Base of functions of positions with settings that are made within compiled code.

    Frozen dataclasses with ``eq=False``. The compiler of torch 2.11 hashes what it calls when that
    has no fields yet: a dataclass's own hash would fail.
    """

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


Mask = Keys | Bias
MaskKind = Keys | Bias | Causal | Window | Blocks | All


def both(one: MaskKind, other: MaskKind) -> All:
    """The masks of both."""
    kinds = [kind.parts if isinstance(kind, All) else (kind,) for kind in (one, other)]
    return All((*kinds[0], *kinds[1]))


@dataclass(slots=True)
class Scoring(_Record):
    """How a kernel turns queries and keys into weights.

    `mask`, `causal`, `window` and `mods` are the normal form of a mask: all of them hold at once.
    """

    mask: Mask | None = None
    causal: bool = False
    """Query i sees keys 0 to i."""
    scale: float | Tensor | None = None
    """Factor of the scores; None is ``D ** -0.5``."""
    upcast_qk: bool = False
    """Compute the scores in float32 (honoured by kernels that round them to the input dtype)."""
    upcast_softmax: bool = False
    image: tuple[int, int] | None = None
    """Where the image tokens stand among the queries, with a text joined to them: start, stop."""
    image_keys: tuple[int, int] | None = None
    """Where the image tokens stand among the keys, with a text joined to them."""
    keep: Keys | None = None
    """Queries, in the place of keys: outputs of those that are not valid are set to zero."""
    eps: float = 1e-15
    """Added to the normaliser by linear attention."""
    window: tuple[int | None, int | None] | None = None
    """Query i sees keys i - left to i + right."""
    mods: tuple[MaskMod, ...] = ()
    """Functions (batch, head, query, key) -> bool, all of which must show a key."""
    dropout: float = 0.0
    """Probability by which a weight is dropped."""

    @property
    def only_causal(self) -> bool:
        """Whether nothing masks but causality, if that."""
        return self.mask is None and self.window is None and len(self.mods) == 0

    def scaled(self, q: Tensor) -> tuple[Tensor, float | None]:
        """Queries and a scale for kernels that take a number: one in a tensor goes into them."""
        scale = self.scale
        return (q * scale.to(q.dtype), 1.0) if isinstance(scale, Tensor) else (q, scale)

    def kept(self, o: Tensor, in_place: bool) -> Tensor:
        """The output ``[B, H, Q, D]`` with zeros for queries that do not count."""
        keep = self.keep
        if keep is None:
            return o
        if not in_place or keep.within is None:
            return o * keep.valid[:, None, :, None]
        # Mostly padding of a text, a hundredth of the queries.
        some = slice(*keep.within)
        o[:, :, some].mul_(keep.valid[:, None, some, None])
        return o


class FrameStep(Protocol):
    """One layer around the line: `enter` on the way in, `leave` on the way out."""

    @property
    def enters(self) -> bool:
        """Whether `enter` does anything; so `leaves` of `leave`."""
        ...

    @property
    def leaves(self) -> bool: ...

    def enter(
        self, at: Site, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...

    def leave(
        self, at: Site, image: Tensor, text: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...


LinearPart = Callable[[Site, str, Tensor, "Tensor | None"], "Tensor | None"]
ProjectPart = Callable[[Site, Tensor, "Tensor | None"], Streams]
NormPart = Callable[[Site, bool], "Norms"]
# Of fewer rows than queries where several that follow one another see the same keys.
EditPart = Callable[[Site, Arranged, Tensor, Tensor], tuple[Tensor, Tensor]]
MaskPart = Callable[[Site, Arranged, Scoring], Scoring]
ScalePart = Callable[[Site], "float | Tensor | None"]
KernelCall = Callable[[Tensor, Tensor, Tensor, Scoring], Tensor]
AroundPart = Callable[[KernelCall, Tensor, Tensor, Tensor, Scoring], Tensor]
Branch = tuple[Tensor, Tensor, "float | Tensor"]
"""Keys and values ``[B, tokens, H*D]`` under a softmax of their own, and their weight."""
# A list holds what the attention's own queries look at besides: to be added where it is computed.
PromptPart = Callable[[Site, Arranged, KernelCall], "Tensor | list[Branch] | None"]
OutputPart = Callable[
    [Site, Tensor, "tuple[int, int] | None", "Tensor | None"],
    "tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]",
]


@dataclass(frozen=True)
class Recipe:
    """The parts of one kind of attention, in the order of the line.

    Every part is a module-level function or a frozen dataclass, so a recipe pickles, compares and
    prints. `but` makes a changed copy; nothing changes a recipe in place.
    """

    frame: tuple[FrameStep, ...]
    """Layers around the whole: grids, norms of the input, residual. The first is the outermost."""
    linears: tuple[LinearPart, ...]
    """What a projection computes: the first that answers replaces, later ones add."""
    project: ProjectPart
    """Which projections make the streams."""
    norm: NormPart
    """Which layers norm queries and keys, given whether there is a text."""
    rotary: Rotary | None
    """Position embedding of queries and keys."""
    text_first: bool
    """Whether the text stands before the image in a joint sequence."""
    edits: tuple[EditPart, ...]
    """Changes to keys and values, in order."""
    mask: MaskPart
    """The call's mask as a mask kind."""
    scale: ScalePart
    """The factor of the scores."""
    kernel: Kernel
    """What computes attention; `Processor._attention_backend` overrides it by name."""
    around: tuple[AroundPart, ...]
    """Wrappers of the kernel call; the first is the outermost."""
    prompts: tuple[PromptPart, ...]
    """Image prompts; their sum is added to the image stream."""
    output: OutputPart
    """Projections of the result."""

    def __post_init__(self) -> None:
        # Worked out once: the sides of the frame's steps that do anything.
        entering = tuple(step.enter for step in self.frame if step.enters)
        leaving = tuple(step.leave for step in reversed(self.frame) if step.leaves)
        object.__setattr__(self, "entering", entering)
        object.__setattr__(self, "leaving", leaving)

    if TYPE_CHECKING:
        entering: ClassVar[tuple[Callable[..., tuple[Tensor, Tensor | None]], ...]]
        leaving: ClassVar[tuple[Callable[..., tuple[Tensor, Tensor | None]], ...]]

    def but(self, **changes: Any) -> Recipe:
        """A copy with some parts changed."""
        return dataclasses.replace(self, **changes)
