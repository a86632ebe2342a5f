"""U-Nets: self and cross attention (Stable Diffusion, SDXL), added keys and values (Kandinsky)."""

from __future__ import annotations

from typing import Any

from ..calls import AddedCall, PlainCall, TembCall, UNetCall
from ..edits import FirstFrame
from ..frame import ADDED, BARE, UNET
from ..kernels import AUTO, NPU, XFORMERS, XLA
from ..kernels.around import Perturbed, Sliced
from ..layouts import added_kv, packed, separate
from ..linears import module_linear
from ..masks import padded
from ..norms import each_its_own
from ..outputs import to_out
from ..processor import KernelSetting, Processor, Setting
from ..scales import module_scale
from ..types import Recipe

__all__ = [
    "AttnAddedKVProcessor",
    "AttnAddedKVProcessor2_0",
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "CrossFrameAttnProcessor",
    "FusedAttnProcessor2_0",
    "PAGCFGIdentitySelfAttnProcessor2_0",
    "PAGIdentitySelfAttnProcessor2_0",
    "SlicedAttnAddedKVProcessor",
    "SlicedAttnProcessor",
    "XFormersAttnAddedKVProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
]

PLAIN = Recipe(
    frame=UNET,
    linears=(module_linear,),
    project=separate,
    norm=each_its_own,
    rotary=None,
    text_first=False,
    edits=(),
    mask=padded,
    scale=module_scale,
    kernel=AUTO,
    around=(),
    prompts=(),
    output=to_out,
)
ADDED_KV = PLAIN.but(frame=ADDED, project=added_kv, text_first=True)


class ByXFormers(Processor):
    """Runs xformers by `attention_op`, an operator of `xformers.ops`, or by its own choice."""

    attention_op = KernelSetting()


class WithOperator(ByXFormers):
    """Holds a setting of xformers.

    Args:
        attention_op: An operator of `xformers.ops`; None leaves the choice to xformers.
    """

    def __init__(self, attention_op: Any = None) -> None:
        super().__init__()
        self.attention_op = attention_op


class WithPartition(Processor):
    """Holds a setting of torch_xla.

    Args:
        partition_spec: How tensors are partitioned under SPMD.
    """

    partition_spec = KernelSetting()

    def __init__(self, partition_spec: tuple[str | None, ...] | None = None) -> None:
        super().__init__()
        self.partition_spec = partition_spec


class WithSlices(Processor):
    """Holds a setting of sliced attention.

    Args:
        slice_size: How many heads are computed at a time, counted over batch and heads.
    """

    slice_size = Setting("around", Sliced, "size")

    def __init__(self, slice_size: int) -> None:
        super().__init__()
        self.slice_size = slice_size


class AttnProcessor(UNetCall):
    """As `AttnProcessor2_0`, under its older name: no score matrix is made here either."""

    recipe = PLAIN


class AttnProcessor2_0(UNetCall):
    """Attention by torch's scaled dot product attention."""

    recipe = PLAIN


class FusedAttnProcessor2_0(UNetCall):
    """Attention with packed projections: q, k, v (k, v with a context) come from one product."""

    recipe = PLAIN.but(project=packed)


class XFormersAttnProcessor(WithOperator, UNetCall):
    """Attention by xformers."""

    recipe = PLAIN.but(kernel=XFORMERS)


class AttnProcessorNPU(UNetCall):
    """Attention by torch_npu in half precision."""

    recipe = PLAIN.but(kernel=NPU)


class XLAFlashAttnProcessor2_0(WithPartition, UNetCall):
    """Attention by torch_xla's Pallas kernel for long sequences."""

    recipe = PLAIN.but(kernel=XLA)


class SlicedAttnProcessor(WithSlices, PlainCall):
    """Attention a few heads at a time, to save memory."""

    recipe = PLAIN.but(around=(Sliced(1),))


class CrossFrameAttnProcessor(PlainCall):
    """In self attention each frame of a video sees the first (Text2Video-Zero).

    Args:
        batch_size: How many videos the batch holds; 2 under classifier-free guidance.
    """

    recipe = PLAIN.but(frame=BARE, edits=(FirstFrame(2),))
    batch_size = Setting("edits", FirstFrame, "batch_size")

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size


class PAGIdentitySelfAttnProcessor2_0(TembCall):
    """Self attention, perturbed in the second half of the batch."""

    recipe = PLAIN.but(around=(Perturbed(2),))


class PAGCFGIdentitySelfAttnProcessor2_0(TembCall):
    """Self attention, perturbed in the last third of the batch."""

    recipe = PLAIN.but(around=(Perturbed(3),))


class AttnAddedKVProcessor(AddedCall):
    """As `AttnAddedKVProcessor2_0`, under its older name."""

    recipe = ADDED_KV


class AttnAddedKVProcessor2_0(AddedCall):
    """Attention of a grid to a text and itself, by torch's scaled dot product attention."""

    recipe = ADDED_KV


class XFormersAttnAddedKVProcessor(WithOperator, PlainCall):
    """Attention of a grid to a text and itself, by xformers."""

    recipe = ADDED_KV.but(kernel=XFORMERS)


class SlicedAttnAddedKVProcessor(WithSlices, TembCall):
    """Attention of a grid to a text and itself, a few heads at a time."""

    recipe = ADDED_KV.but(around=(Sliced(1),))
