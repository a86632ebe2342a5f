"""Diffusion transformers with one set of projections: video, audio, Hunyuan-DiT, Lumina, Sana."""

from __future__ import annotations

from ..calls import (
    CogVideoXCall,
    GridCall,
    LuminaCall,
    PlainCall,
    RotaryCall,
    StableAudioCall,
)
from ..frame import BARE, GRID_IN, SANA, STABLE_AUDIO, TEMPORAL
from ..kernels import RELU_ADAPTIVE, RELU_LINEAR
from ..kernels.around import Perturbed
from ..layouts import multiscale, packed, shared, shared_packed
from ..masks import truthy, unmasked
from ..norms import one_for_both, unnormed
from ..outputs import grid_out, raw_heads, to_out_shared
from ..rotary import Rotary, axes, complex_pairs, halves, pairs
from ..scales import proportional
from .unet import PLAIN

__all__ = [
    "AllegroAttnProcessor2_0",
    "CogVideoXAttnProcessor2_0",
    "FusedCogVideoXAttnProcessor2_0",
    "FusedHunyuanAttnProcessor2_0",
    "HunyuanAttnProcessor2_0",
    "LuminaAttnProcessor2_0",
    "MochiVaeAttnProcessor2_0",
    "PAGCFGHunyuanAttnProcessor2_0",
    "PAGCFGSanaLinearAttnProcessor2_0",
    "PAGHunyuanAttnProcessor2_0",
    "PAGIdentitySanaLinearAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0",
    "SanaMultiscaleAttnProcessor2_0",
    "StableAudioAttnProcessor2_0",
]

HUNYUAN = PLAIN.but(rotary=Rotary(pairs))
COGVIDEOX = PLAIN.but(
    frame=BARE,
    project=shared,
    norm=one_for_both,
    rotary=Rotary(pairs),
    text_first=True,
    output=to_out_shared,
)
LINEAR = PLAIN.but(frame=SANA, kernel=RELU_LINEAR)


class HunyuanAttnProcessor2_0(RotaryCall):
    """Attention with rotary embedding; in cross attention of the queries alone (Hunyuan-DiT)."""

    recipe = HUNYUAN


class FusedHunyuanAttnProcessor2_0(RotaryCall):
    """Hunyuan-DiT attention with packed projections once the module is fused."""

    recipe = HUNYUAN.but(project=packed)


class PAGHunyuanAttnProcessor2_0(RotaryCall):
    """Hunyuan-DiT self attention, perturbed in the second half of the batch."""

    recipe = HUNYUAN.but(around=(Perturbed(2),))


class PAGCFGHunyuanAttnProcessor2_0(RotaryCall):
    """Hunyuan-DiT self attention, perturbed in the last third of the batch."""

    recipe = HUNYUAN.but(around=(Perturbed(3),))


class AllegroAttnProcessor2_0(RotaryCall):
    """Attention with rotary embedding along three axes, in self attention (Allegro)."""

    recipe = PLAIN.but(rotary=Rotary(axes, queries="self"))


class CogVideoXAttnProcessor2_0(CogVideoXCall):
    """Joint attention by shared projections; the image alone has positions (CogVideoX)."""

    recipe = COGVIDEOX


class FusedCogVideoXAttnProcessor2_0(CogVideoXCall):
    """CogVideoX attention with packed projections once the module is fused."""

    recipe = COGVIDEOX.but(project=shared_packed)


class StableAudioAttnProcessor2_0(StableAudioCall):
    """Attention with fewer key heads and rotary embedding of a part of a head (Stable Audio)."""

    recipe = PLAIN.but(frame=STABLE_AUDIO, rotary=Rotary(halves))


class LuminaAttnProcessor2_0(LuminaCall):
    """Attention with fewer key heads, scaled by the length; gives heads, unprojected (Lumina)."""

    recipe = PLAIN.but(
        frame=GRID_IN,
        rotary=Rotary(complex_pairs, keys="own"),
        mask=truthy,
        scale=proportional,
        output=raw_heads,
    )


class MochiVaeAttnProcessor2_0(PlainCall):
    """Attention over the frames of a pixel, causal where the module is (Mochi's autoencoder)."""

    recipe = PLAIN.but(frame=TEMPORAL)


class SanaLinearAttnProcessor2_0(PlainCall):
    """Linear attention with ReLU features (Sana)."""

    recipe = LINEAR


class PAGIdentitySanaLinearAttnProcessor2_0(PlainCall):
    """Sana's linear attention, perturbed in the second half of the batch."""

    recipe = LINEAR.but(around=(Perturbed(2),))


class PAGCFGSanaLinearAttnProcessor2_0(PlainCall):
    """Sana's linear attention, perturbed in the last third of the batch."""

    recipe = LINEAR.but(around=(Perturbed(3),))


class SanaMultiscaleAttnProcessor2_0(GridCall):
    """Attention over several scales: linear on large grids, quadratic on small (DC-AE)."""

    recipe = PLAIN.but(
        frame=(),
        project=multiscale,
        norm=unnormed,
        mask=unmasked,
        kernel=RELU_ADAPTIVE,
        output=grid_out,
    )
