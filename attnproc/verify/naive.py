"""Attention written out plainly, with every option honoured: the oracle where diffusers is wrong.

One function a family, in the dtype of the module (the callers use float64). Nothing here is
shared with the package's own line of parts, nor with diffusers; only the module's layers (its
linears and norms) are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "naive"]

Inputs = Mapping[str, Any]
_PERTURBED = {"PAGCFG": 3, "PAG": 2}


def naive(cls: str, attn: Any, processor: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """The right output of class `cls` on `attn`, whatever diffusers makes of it.

    Args:
        cls: name of the processor class.
        attn: the attention module.
        processor: holder of the processor's weights and settings.
        inputs: keywords of the call.

    Returns:
        The outputs, in the class's order.
    """
    for family, mark in _FAMILIES:
        if mark in cls:
            return family(cls, attn, processor, inputs)
    return (_unet(cls, attn, processor, inputs),)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax attention; [B, H, Q, D] on [B, h, K, D], each of the h heads serving H / h."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (q @ k.mT * scale + bias).softmax(dim=-1) @ v


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _normed(norm: Any, x: Tensor) -> Tensor:
    """`x` [B, H, S, D] through a norm made for one head or, by its width, for all of them."""
    width = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    if isinstance(width, (tuple, torch.Size)) and tuple(width) != (x.shape[-1],):
        return _split(norm(_merge(x)), x.shape[1])
    return norm(x) if norm is not None else x


def _bias(mask: Any, q: Tensor, keys: int) -> Tensor | float:
    """The mask, in any of the accepted forms, as numbers to add to the scores."""
    if mask is None:
        return 0.0
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
    if mask.ndim == 2:
        mask = mask[:, None, None]
    elif mask.ndim == 3:
        mask = mask.reshape(len(q), -1, *mask.shape[1:])
    return F.pad(mask, (0, keys - mask.shape[-1]))


def _causal(attn: Any, q: Tensor, k: Tensor) -> Tensor | float:
    if not getattr(attn, "is_causal", False):
        return 0.0
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return torch.zeros(later.shape, dtype=q.dtype).masked_fill(later, -math.inf)


def _scale(attn: Any, q: Tensor) -> float:
    return getattr(attn, "scale", q.shape[-1] ** -0.5)


def _project(attn: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q of `x`, k and v of `y`, in heads; through the joint matrix if the module is fused."""
    sizes = [layer.out_features for layer in (attn.to_q, attn.to_k, attn.to_v)]
    if not getattr(attn, "fused_projections", False):
        q, k, v = attn.to_q(x), attn.to_k(y), attn.to_v(y)
    elif x is y:
        q, k, v = attn.to_qkv(x).split(sizes, dim=-1)
    else:
        q, (k, v) = attn.to_q(x), attn.to_kv(y).split(sizes[1:], dim=-1)
    width = q.shape[-1] // attn.heads
    q, k, v = (_split(z, z.shape[-1] // width) for z in (q, k, v))
    return _normed(attn.norm_q, q), _normed(attn.norm_k, k), v


def _added(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        q, k, v = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    q, k, v = (_split(z, attn.heads) for z in (q, k, v))
    return _normed(attn.norm_added_q, q), _normed(attn.norm_added_k, k), v


def _out(attn: Any, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT if x.ndim == 4 else x


def _like(x: Tensor, example: Tensor) -> Tensor:
    return x.mT.reshape(example.shape) if example.ndim == 4 else x


def _chunks(cls: str) -> int:
    return next((n for mark, n in _PERTURBED.items() if cls.startswith(mark)), 0)


def _turn(x: Tensor, tables: Any, halves: bool = False) -> Tensor:
    """Rotate the leading channels of x [B, H, S, D] by tables (cos, sin) [S, d]."""
    cos, sin = (table.to(x.dtype) for table in tables)
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    if halves:
        one, two = part.chunk(2, dim=-1)
        turned = torch.cat([-two, one], dim=-1)
    else:
        turned = torch.stack([-part[..., 1::2], part[..., 0::2]], dim=-1).flatten(-2)
    return torch.cat([part * cos + turned * sin, rest], dim=-1)


def _turn_axes(x: Tensor, tables: Any) -> Tensor:
    pairs, places = tables
    parts = zip(x.chunk(3, dim=-1), pairs, places, strict=True)
    return torch.cat(
        [_turn(part, [t[place[0]] for t in pair], halves=True) for part, pair, place in parts], -1
    )


def _rotate(cls: str, attn: Any, inputs: Inputs, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The plain family's rotary forms; keys of another sequence stay as they are."""
    tables = inputs.get("image_rotary_emb", inputs.get("rotary_emb"))
    if tables is None:
        return q, k
    turn: Callable[[Tensor, Any], Tensor] = _turn
    if cls.startswith("Allegro"):
        turn = _turn_axes
        if attn.is_cross_attention:
            return q, k
    if cls.startswith("StableAudio"):
        return _turn(q, tables, True), k if attn.is_cross_attention else _turn(k, tables, True)
    return turn(q, tables), k if attn.is_cross_attention else turn(k, tables)


def _context(attn: Any, processor: Any, inputs: Inputs, x: Tensor) -> tuple[Tensor, Any]:
    """The sequence of keys, and the image prompts that came with it."""
    context, prompts = inputs.get("encoder_hidden_states"), ()
    if isinstance(context, tuple):
        context, prompts = context
    elif hasattr(processor, "to_k_ip") and context is not None:
        cut = context.shape[1] - processor.num_tokens[0]
        context, prompts = context[:, :cut], [context[:, cut:]]
    if context is None:
        return x, prompts
    if getattr(attn, "norm_cross", None) is not None:
        flip = isinstance(attn.norm_cross, torch.nn.GroupNorm)
        context = attn.norm_cross(context.mT).mT if flip else attn.norm_cross(context)
    return context, prompts


def _unet(cls: str, attn: Any, processor: Any, inputs: Inputs) -> Tensor:
    residual = x = inputs["hidden_states"]
    if getattr(attn, "spatial_norm", None) is not None:
        x = attn.spatial_norm(x, inputs["temb"])
    x = _to_tokens(x)
    if attn.group_norm is not None:
        x = attn.group_norm(x.mT).mT
    y, prompts = _context(attn, processor, inputs, x)
    q, k, v = _project(attn, x, y)
    q, k = _rotate(cls, attn, inputs, q, k)
    bias = inputs.get("attention_mask")
    if cls.startswith("CrossFrame") and y is x:
        frames = len(x) // processor.batch_size
        k, v = (z[torch.arange(len(z)) // frames * frames] for z in (k, v))
    if chunks := _chunks(cls):
        cut = len(q) // chunks * (chunks - 1)
        seen = attend(q[:cut], k[:cut], v[:cut], _scale(attn, q), _bias(bias, q[:cut], k.shape[2]))
        o = torch.cat([seen, v[cut:].repeat_interleave(q.shape[1] // v.shape[1], dim=1)])
    elif cls.startswith("MochiVae") and y is x and x.shape[1] == 1:
        o = v
    else:
        o = attend(q, k, v, _scale(attn, q), _bias(bias, q, k.shape[2]) + _causal(attn, q, k))
    o = _merge(o) + _prompted(attn, processor, inputs, q, prompts)
    o = _like(_out(attn, o), residual)
    if attn.residual_connection and not cls.startswith("CrossFrame"):
        o = o + residual
    return o / attn.rescale_output_factor


def _prompted(attn: Any, processor: Any, inputs: Inputs, q: Tensor, prompts: Any) -> Any:
    """What the image prompts add: [B, Q, C], each image weighted by its scale and its mask."""
    total: Any = torch.zeros(())
    masks = inputs.get("ip_adapter_masks")
    if isinstance(masks, Tensor):
        masks = list(masks[:, None])
    for i, states in enumerate(prompts):
        scale, mask = processor.scale[i], None if masks is None else masks[i]
        images = states.unbind(1) if mask is not None else [states.flatten(1, -2)]
        for j, image in enumerate(images):
            k, v = (
                _split(layer(image), attn.heads)
                for layer in (processor.to_k_ip[i], processor.to_v_ip[i])
            )
            seen = _merge(attend(q, k, v, _scale(attn, q)))
            if mask is not None:
                seen = seen * _resized(mask[0, j], q.shape[2])[:, None].to(seen.dtype)
            total = total + seen * (scale[j] if isinstance(scale, list) else scale)
    return total


def _resized(mask: Tensor, queries: int) -> Tensor:
    """A picture's mask [h, w] at the resolution of `queries` tokens of its aspect."""
    height = int(math.sqrt(queries * mask.shape[0] / mask.shape[1]))
    height += queries % height != 0
    size = (height, queries // height)
    small = F.interpolate(mask[None, None], size=size, mode="bicubic").flatten()
    return F.pad(small, (0, queries - len(small)))


def _custom(cls: str, attn: Any, processor: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    x = inputs["hidden_states"]
    y, _ = _context(attn, processor, inputs, x)
    to_q, to_out = attn.to_q, attn.to_out
    to_k, to_v = attn.to_k, attn.to_v
    if processor.train_q_out:
        to_q, to_out = processor.to_q_custom_diffusion, processor.to_out_custom_diffusion
    if processor.train_kv:
        to_k, to_v = processor.to_k_custom_diffusion, processor.to_v_custom_diffusion
    q, k, v = (_split(z, attn.heads) for z in (to_q(x), to_k(y), to_v(y)))
    if y is not x:
        k, v = (torch.cat([z[:, :, :1].detach(), z[:, :, 1:]], dim=2) for z in (k, v))
    q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
    o = attend(q, k, v, _scale(attn, q), _bias(inputs.get("attention_mask"), q, k.shape[2]))
    return (to_out[1](to_out[0](_merge(o))),)


def _added_kv(cls: str, attn: Any, processor: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    residual = x = inputs["hidden_states"]
    if attn.spatial_norm is not None:
        x = attn.spatial_norm(x, inputs["temb"])
    x = x.flatten(2).mT
    text, _ = _context(attn, processor, inputs, x)
    x = attn.group_norm(x.mT).mT
    q = _normed(attn.norm_q, _split(attn.to_q(x), attn.heads))
    k = _normed(attn.norm_added_k, _split(attn.add_k_proj(text), attn.heads))
    v = _split(attn.add_v_proj(text), attn.heads)
    if not attn.only_cross_attention:
        own = _normed(attn.norm_k, _split(attn.to_k(x), attn.heads))
        k = torch.cat([k, own], dim=2)
        v = torch.cat([v, _split(attn.to_v(x), attn.heads)], dim=2)
    o = attend(q, k, v, _scale(attn, q), _bias(inputs.get("attention_mask"), q, k.shape[2]))
    return (_out(attn, _merge(o)).mT.reshape(residual.shape) + residual,)


def _joint(cls: str, attn: Any, processor: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    grid, text = inputs["hidden_states"], inputs.get("encoder_hidden_states")
    x = _to_tokens(grid)
    order = -1 if "AuraFlow" in cls else 1
    streams = [_project(attn, x, x)] + ([] if text is None else [_added(attn, text)])
    q, k, v = (torch.cat(z, dim=2) for z in zip(*streams[::order], strict=True))
    o = _merge(_joint_attend(cls, attn, q, k, v, inputs, x.shape[1]))
    lengths = [stream[0].shape[2] for stream in streams]
    image, *rest = o.split(lengths[::order], dim=1)[::order]
    if inputs.get("ip_hidden_states") is not None:
        image = image + _sd3_prompt(attn, processor, inputs, x)
    if not attn.context_pre_only:
        rest = [attn.to_add_out(written) for written in rest]
    return _like(_out(attn, image), grid), *rest


def _joint_attend(
    cls: str, attn: Any, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, image: int
) -> Tensor:
    """Joint attention; a perturbed image token sees the text and itself, no other image token."""
    bias = _bias(inputs.get("attention_mask"), q, k.shape[2])
    if chunks := _chunks(cls):
        others = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
        others[:image, :image] = ~torch.eye(image, dtype=torch.bool)
        hidden = torch.zeros(others.shape, dtype=q.dtype).masked_fill(others, -math.inf)
        perturbed = torch.arange(len(q)) >= len(q) // chunks * (chunks - 1)
        bias = bias + torch.where(perturbed[:, None, None, None], hidden, 0.0)
    return attend(q, k, v, _scale(attn, q), bias)


def _sd3_prompt(attn: Any, processor: Any, inputs: Inputs, x: Tensor) -> Tensor:
    """SD3's image prompt: raw queries under its own norms see the image and prompt keys."""
    states = processor.norm_ip(inputs["ip_hidden_states"], temb=inputs["temb"])
    q, k, v = (_split(layer(x), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
    prompt = _split(processor.to_k_ip(states), attn.heads)
    k = torch.cat([processor.norm_k(k), processor.norm_ip_k(prompt)], dim=2)
    v = torch.cat([v, _split(processor.to_v_ip(states), attn.heads)], dim=2)
    return processor.scale * _merge(attend(processor.norm_q(q), k, v, _scale(attn, q)))


def _cogvideo(cls: str, attn: Any, processor: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    text, image = inputs["encoder_hidden_states"], inputs["hidden_states"]
    x = torch.cat([text, image], dim=1)
    q, k, v = _project(attn, x, x)
    cut = text.shape[1]
    if (tables := inputs.get("image_rotary_emb")) is not None:
        q = torch.cat([q[:, :, :cut], _turn(q[:, :, cut:], tables)], dim=2)
        if not attn.is_cross_attention:
            k = torch.cat([k[:, :, :cut], _turn(k[:, :, cut:], tables)], dim=2)
    o = attend(q, k, v, _scale(attn, q), _bias(inputs.get("attention_mask"), q, k.shape[2]))
    o = _out(attn, _merge(o))
    return o[:, cut:], o[:, :cut]


def _lumina(cls: str, attn: Any, processor: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    x = _to_tokens(inputs["hidden_states"])
    q, k, v = _project(attn, x, inputs["encoder_hidden_states"])
    scale = _scale(attn, q)
    if (turns := inputs.get("query_rotary_emb")) is not None:
        q = _turn_complex(q, turns)
    if (turns := inputs.get("key_rotary_emb")) is not None:
        k = _turn_complex(k, turns)
        if (base := inputs.get("base_sequence_length")) is not None:
            scale = scale * math.sqrt(math.log(x.shape[1]) / math.log(base))
    o = attend(q, k, v, scale, _bias(inputs.get("attention_mask"), q, k.shape[2]))
    return (o.transpose(1, 2),)


def _turn_complex(x: Tensor, turns: Tensor) -> Tensor:
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * turns[:, None]).flatten(-2)


def _mochi(cls: str, attn: Any, processor: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    image, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    q, k, v = _project(attn, image, image)
    if (tables := inputs.get("image_rotary_emb")) is not None:
        cos, sin = (t.transpose(0, 1).repeat_interleave(2, dim=-1) for t in tables)
        q, k = _turn(q, (cos, sin)), _turn(k, (cos, sin))
    q, k, v = (torch.cat(z, dim=2) for z in zip((q, k, v), _added(attn, text), strict=True))
    mask = inputs.get("attention_mask")
    valid = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    valid = F.pad(valid, (image.shape[1], 0), value=True)
    o = _merge(attend(q, k, v, _scale(attn, q), _bias(valid, q, k.shape[2])))
    o = torch.where(valid[..., None], o, 0.0)
    seen, written = o.split([image.shape[1], text.shape[1]], dim=1)
    return _out(attn, seen), written if attn.context_pre_only else attn.to_add_out(written)


def _sana(cls: str, attn: Any, processor: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    x = inputs["hidden_states"]
    context = inputs.get("encoder_hidden_states")
    q, k, v = _project(attn, x, x if context is None else context)
    cut = len(x) - (len(x) // chunks if (chunks := _chunks(cls)) else 0)
    bias = torch.as_tensor(_bias(inputs.get("attention_mask"), q[:cut], k.shape[2]))
    weights = q[:cut].relu() @ k[:cut].relu().mT * bias.exp()
    o = weights @ v[:cut] / (weights.sum(dim=-1, keepdim=True) + 1e-15)
    if cut < len(x):
        o = torch.cat([o, v[cut:]])
    return (_out(attn, _merge(o)),)


_FAMILIES: tuple[tuple[Callable[..., tuple[Tensor, ...]], str], ...] = (
    (_custom, "CustomDiffusion"),
    (_added_kv, "AddedKV"),
    (_cogvideo, "CogVideoX"),
    (_lumina, "Lumina"),
    (_mochi, "MochiAttn"),
    (_sana, "SanaLinear"),
    (_joint, "Joint"),
    (_joint, "AuraFlow"),
)
