"""Other calls than those of `rows`: odd lengths, other channels a head, other batches.

The point is that nothing is tuned to the listed shapes: here ours must not fall below diffusers'
by more than 5 %.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rows import ROWS, Row, pairs

__all__ = ["VARIANTS"]

_LISTED = {row.name: row for row in ROWS}


def _self(batch: int, tokens: int, heads: int, dim: int, **more: Any) -> Row:
    module = {"query_dim": heads * dim, "heads": heads, "dim_head": dim, **more}
    name = f"self-{batch}x{tokens}-{heads}x{dim}"
    return Row(name, "AttnProcessor2_0", (batch, tokens, heads * dim), module=module)


def _cross(batch: int, tokens: int, keys: int, heads: int, dim: int) -> Row:
    row = _self(batch, tokens, heads, dim, cross_attention_dim=768)
    name = f"cross-{batch}x{tokens}x{keys}-{heads}x{dim}"
    return replace(row, name=name, text=(batch, keys, 768))


def _normed(batch: int, tokens: int, heads: int, dim: int, norm: str) -> Row:
    row = _self(batch, tokens, heads, dim, qk_norm=norm, bias=True, eps=1e-6)
    name = f"normed-{batch}x{tokens}-{heads}x{dim}"
    return replace(row, name=name, cls="HunyuanAttnProcessor2_0", more=pairs(dim))


def _joint(batch: int, tokens: int, text: int, heads: int, dim: int, **more: Any) -> Row:
    width = heads * dim
    module = {"added_kv_proj_dim": width, "context_pre_only": False, "bias": True, **more}
    return replace(
        _self(batch, tokens, heads, dim, **module),
        name=f"joint-{batch}x{tokens}+{text}-{heads}x{dim}",
        cls="JointAttnProcessor2_0",
        text=(batch, text, width),
    )


def _flux(batch: int, tokens: int, text: int, heads: int, dim: int) -> Row:
    row = _joint(batch, tokens, text, heads, dim, eps=1e-6)
    return replace(
        row,
        name=f"flux-{batch}x{tokens}+{text}-{heads}x{dim}",
        cls="FluxAttnProcessor2_0",
        kind="flux",
        more=pairs(dim, joint=True),
    )


def _cogvideox(batch: int, tokens: int, text: int, heads: int, dim: int) -> Row:
    row = _self(batch, tokens, heads, dim, qk_norm="layer_norm", bias=True, eps=1e-6)
    return replace(
        row,
        name=f"cogvideox-{batch}x{tokens}+{text}-{heads}x{dim}",
        cls="CogVideoXAttnProcessor2_0",
        text=(batch, text, heads * dim),
        more=pairs(dim),
    )


def _linear(batch: int, tokens: int, heads: int, dim: int) -> Row:
    row = _self(batch, tokens, heads, dim)
    return replace(
        row, name=f"sana-{batch}x{tokens}-{heads}x{dim}", cls="SanaLinearAttnProcessor2_0"
    )


def _like(name: str, tag: str, x: tuple[int, ...], **changes: Any) -> Row:
    """A listed row with another input."""
    return replace(_LISTED[name], name=f"{name}-{tag}", x=x, **changes)


def _prompted(tokens: int, heads: int, dim: int) -> Row:
    """Two image prompts beside a text, as the layers of Stable Diffusion 1.5 have them."""
    row, width = _LISTED["sdxl-ip-cross-4096"], heads * dim
    return replace(
        row,
        name=f"prompted-2x{tokens}-{heads}x{dim}",
        x=(2, tokens, width),
        module={**row.module, "query_dim": width, "heads": heads, "dim_head": dim},
        init={**row.init, "hidden_size": width},
    )


VARIANTS = [
    _self(1, 1021, 8, 40),
    _self(16, 256, 8, 40),
    _self(3, 777, 5, 64),
    _self(1, 4097, 10, 64),
    _self(16, 1024, 10, 64),
    _self(2, 2000, 16, 72),
    _self(4, 64, 8, 80),
    _self(2, 1021, 8, 96),
    _self(1, 8191, 12, 128),
    _self(8, 64, 8, 160),
    _self(2, 1500, 4, 256),
    _cross(1, 1021, 61, 8, 40),
    _cross(16, 256, 77, 8, 160),
    _cross(4, 4096, 154, 10, 64),
    _cross(2, 999, 300, 20, 112),
    _normed(1, 1021, 16, 40, "layer_norm"),
    _normed(3, 777, 16, 88, "layer_norm"),
    _normed(16, 256, 6, 128, "rms_norm"),
    _normed(2, 1500, 4, 256, "layer_norm"),
    _joint(1, 1021, 77, 24, 64),
    _joint(16, 256, 77, 24, 64, qk_norm="rms_norm", eps=1e-6),
    _joint(2, 4095, 154, 12, 128, qk_norm="rms_norm", eps=1e-6),
    _joint(3, 777, 333, 18, 72, qk_norm="layer_norm", eps=1e-6),
    _flux(1, 1021, 512, 24, 128),
    _flux(16, 256, 128, 24, 128),
    _flux(2, 2047, 77, 16, 64),
    _flux(1, 4096, 512, 12, 256),
    _cogvideox(2, 1350, 226, 30, 64),
    _cogvideox(1, 3001, 77, 16, 128),
    _linear(1, 1021, 70, 32),
    _linear(16, 256, 36, 32),
    _linear(2, 4097, 20, 64),
    _like("sdxl-pagcfg-self-4096", "odd", (6, 1021, 640)),
    _like("sd3-pag-joint-4096", "odd", (4, 777, 1536), text=(4, 77, 1536)),
    _like("sdxl-ip-cross-4096", "odd", (2, 1021, 640)),
    _prompted(4096, 8, 40),
    _prompted(1024, 8, 80),
    _prompted(256, 8, 160),
    _like("stable-audio-self-1024", "batch-1", (1, 216, 1536)),
    _like("stable-audio-cross", "odd", (2, 777, 1536)),
    _like("lumina-self-4096-gqa", "odd", (2, 1021, 2304), text=(2, 1021, 2304)),
    _like("mochi-16384+256-masked", "odd", (2, 1021, 3072)),
    _like("mochi-vae-temporal", "7-frames", (1000, 7, 768)),
    # Attention over time: of AnimateDiff, and of Stable Video Diffusion.
    _self(8192, 16, 8, 40),
    _self(1152, 25, 20, 64),
    _self(288, 14, 20, 64),
    _like("dcae-multiscale-64x64", "odd", (1, 512, 31, 33)),
    _like("kandinsky-addedkv-1024", "odd", (2, 768, 17, 23)),
    _like("allegro-28800", "odd", (1, 1021, 2304)),
    _like("auraflow-4096+256", "odd", (2, 1021, 3072), text=(2, 77, 3072)),
    _like("sd15-eager-4096", "odd", (1, 1021, 320)),
    _like("sd15-sliced-4096", "odd", (3, 777, 320)),
    _like("sd15-cross-frame-8x4096", "odd", (4, 777, 320)),
]
