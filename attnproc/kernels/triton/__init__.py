"""Fused kernels in Triton, one file each; what they compute stands in plain torch elsewhere.

Importing Triton takes its time, so `attnproc.kernels.fusing.fusable` imports the files of those
that the line calls when it first finds a tensor for them. Whoever has asked it reaches them here:
an import within a function costs the CPU as much as a launch each time that it runs.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import branches as branches
    from . import groupnorm as groupnorm
    from . import lay as lay
    from . import linear as linear
    from . import maps as maps
    from . import merge as merge
    from . import multiscale as multiscale
    from . import residual as residual
    from . import short as short

FILES = (
    *("branches", "groupnorm", "lay", "linear", "maps", "merge", "multiscale", "residual"),
    "short",
)
