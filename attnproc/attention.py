"""Attention modules with diffusers' constructor arguments, attributes and state keys.

They hold the weights; the computation is their processor's. State dicts go both ways between
them and their namesakes in diffusers 0.42.1, which are not needed to use them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .families import preset, switched
from .modules import (
    MochiRMSNorm,
    QKNorm,
    SanaMultiscaleAttentionProjection,
    SpatialNorm,
    check_divides,
    check_one_of,
    check_positive,
    normalization,
)

__all__ = ["Attention", "MochiAttention", "SanaMultiscaleLinearAttention"]

# Pipelines pass these to every layer, whether or not its processor uses them.
_OPTIONAL_KEYWORDS = frozenset({"ip_adapter_masks", "ip_hidden_states"})
_FIXED_PARAMETERS = frozenset(
    {"self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask"}
)


@cache
def _named_parameters(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return frozenset(named - _FIXED_PARAMETERS)


def _keywords(processor: object) -> frozenset[str]:
    """What `processor` can be given by name, besides what every processor gets."""
    if not callable(processor):
        raise ValueError(f"processor: got {processor!r}, need something that can be called")
    kind = type(processor)
    call = kind.__call__
    if issubclass(kind, nn.Module) and call is nn.Module.__call__:
        call = kind.forward
    return _named_parameters(call if inspect.isfunction(call) else processor)


def _need(package: str, install: str) -> None:
    if package not in sys.modules and find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: {install}", name=package)


class _Processed(nn.Module):
    """A module whose computation is its `processor`'s."""

    processor: Callable[..., Any]
    _accepted: frozenset[str]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "processor":
            self._accepted = _keywords(value)
            # torch refuses a plain object where a module was.
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def set_processor(self, processor: Callable[..., Any]) -> None:
        """Makes `processor` the one in use; the weights of the one before go with it."""
        self.processor = processor

    def get_processor(self, return_deprecated_lora: bool = False) -> Callable[..., Any]:
        """The processor in use; the argument is there for diffusers' callers and ignored."""
        return self.processor


class _ContextProcessed(_Processed):
    """One whose processor takes a context and a mask."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Any:
        """Runs the processor.

        Args:
            hidden_states: [B, N, C], or [B, C, H, W] where the processor allows it.
            encoder_hidden_states: [B, M, C']; None for self-attention.
            attention_mask: as the processor takes it.
            **cross_attention_kwargs: what else the processor's `__call__` names.

        Returns:
            What the processor returns: a tensor, or a tuple with one tensor a stream.

        Raises:
            TypeError: the processor's `__call__` doesn't name one of the keywords.
        """
        if cross_attention_kwargs:
            cross_attention_kwargs = self._passed_on(cross_attention_kwargs)
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **cross_attention_kwargs,
        )

    def _passed_on(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        unknown = [k for k in keywords if k not in self._accepted and k not in _OPTIONAL_KEYWORDS]
        if unknown:
            raise TypeError(
                f"{type(self.processor).__name__} takes no {', '.join(sorted(unknown))};"
                f" possible are {', '.join(sorted(self._accepted)) or 'none'}"
            )
        return {name: value for name, value in keywords.items() if name in self._accepted}


class Attention(_ContextProcessed):
    """Multi-head attention over one stream or two, with everything diffusers' models ask of it.

    It also stands for diffusers' `FluxAttention`, state keys and all: pass `qk_norm="rms_norm"`,
    and with `added_kv_proj_dim` also `context_pre_only=False`, since a Flux block always
    projects both streams; a single-stream block is `pre_only=True`. The rotary table is then the
    keyword `image_rotary_emb`. Flux's norms stay in fp32 until weighted, this module's round to
    the weight's dtype first, so half precision differs by rounding.

    Args:
        query_dim: channels of the hidden states.
        cross_attention_dim: channels of the context; None for self-attention.
        heads: number of query heads.
        kv_heads: number of key and value heads, a divisor of `heads`; None for as many.
        dim_head: channels of a head.
        dropout: probability at the output.
        bias: bias of `to_q`, `to_k`, `to_v`.
        upcast_attention: compute the scores in fp32.
        upcast_softmax: compute the softmax in fp32.
        cross_attention_norm: norm of the context: None, `"layer_norm"` or `"group_norm"`.
        cross_attention_norm_num_groups: its groups, for `"group_norm"`.
        qk_norm: norm of queries and keys: None, `"layer_norm"`, `"fp32_layer_norm"`, `"rms_norm"`
            or `"l2"` within each head; `"layer_norm_across_heads"` or `"rms_norm_across_heads"`.
        added_kv_proj_dim: channels of a second stream with projections of its own.
        added_proj_bias: bias of `add_q_proj`, `add_k_proj`, `add_v_proj`.
        norm_num_groups: groups of a group norm of the input; None for no such norm.
        spatial_norm_dim: channels of the map of a spatial norm of the input; None for no norm.
        out_bias: bias of the output projections.
        scale_qk: scale scores by `dim_head ** -0.5`; else by 1.
        only_cross_attention: keys and values come from the second stream alone.
        eps: of the group norm of the input and the norms of queries and keys.
        rescale_output_factor: divides the output.
        residual_connection: add the input to the output.
        processor: what computes the attention; None for `AttnProcessor2_0`.
        out_dim: channels of the output, and of all query heads together; a multiple of
            `dim_head`, from which the number of heads follows. None for `query_dim`.
        out_context_dim: channels of the second stream's output; None for `query_dim`.
        context_pre_only: the second stream has queries; False: and an output projection.
            None: neither.
        pre_only: leave out the output projection.
        elementwise_affine: the norms of queries and keys within each head have weights.
        is_causal: a token sees no later one, where the processor honours it.

    Raises:
        ValueError: an argument is out of range or doesn't go with another.
    """

    group_norm: nn.GroupNorm | None
    spatial_norm: SpatialNorm | None
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    norm_cross: nn.LayerNorm | nn.GroupNorm | None
    norm_added_q: nn.Module | None
    norm_added_k: nn.Module | None
    to_q: nn.Linear
    to_k: nn.Linear | None
    to_v: nn.Linear | None
    add_q_proj: nn.Linear | None
    add_k_proj: nn.Linear | None
    add_v_proj: nn.Linear | None
    to_out: nn.ModuleList | None
    to_add_out: nn.Linear | None

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        upcast_attention: bool = False,
        upcast_softmax: bool = False,
        cross_attention_norm: str | None = None,
        cross_attention_norm_num_groups: int = 32,
        qk_norm: str | None = None,
        added_kv_proj_dim: int | None = None,
        added_proj_bias: bool | None = True,
        norm_num_groups: int | None = None,
        spatial_norm_dim: int | None = None,
        out_bias: bool = True,
        scale_qk: bool = True,
        only_cross_attention: bool = False,
        eps: float = 1e-5,
        rescale_output_factor: float = 1.0,
        residual_connection: bool = False,
        _from_deprecated_attn_block: bool = False,
        processor: Callable[..., Any] | None = None,
        out_dim: int | None = None,
        out_context_dim: int | None = None,
        context_pre_only: bool | None = None,
        pre_only: bool = False,
        elementwise_affine: bool = True,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.upcast_attention, self.upcast_softmax = upcast_attention, upcast_softmax
        self.use_bias, self.added_proj_bias = bias, added_proj_bias
        self.dropout, self.is_causal = dropout, is_causal
        self.rescale_output_factor = rescale_output_factor
        self.residual_connection = residual_connection
        self.context_pre_only, self.pre_only = context_pre_only, pre_only
        self.only_cross_attention, self.fused_projections = only_cross_attention, False
        self._from_deprecated_attn_block = _from_deprecated_attn_block
        self._set_widths(query_dim, cross_attention_dim, added_kv_proj_dim, out_context_dim)
        self._set_heads(heads, kv_heads, dim_head, out_dim, scale_qk)
        self._check_options(qk_norm)
        self._add_input_norms(norm_num_groups, spatial_norm_dim, eps)
        norm = QKNorm(qk_norm, dim_head, heads, kv_heads or heads, eps, elementwise_affine)
        self.norm_q, self.norm_k = norm.pair()
        self.norm_cross = self._context_norm(cross_attention_norm, cross_attention_norm_num_groups)
        self._add_projections(out_bias)
        self.norm_added_q, self.norm_added_k = self._added_norms(norm)
        self.processor = _default_processor() if processor is None else processor

    def _set_widths(
        self, query: int, context: int | None, added: int | None, out_context: int | None
    ) -> None:
        check_positive(
            query_dim=query,
            cross_attention_dim=context,
            added_kv_proj_dim=added,
            out_context_dim=out_context,
        )
        self.query_dim = query
        self.is_cross_attention = context is not None
        self.cross_attention_dim = query if context is None else context
        self.added_kv_proj_dim = added
        self.out_context_dim = query if out_context is None else out_context

    def _set_heads(
        self, heads: int, kv_heads: int | None, dim_head: int, out_dim: int | None, scale_qk: bool
    ) -> None:
        check_positive(heads=heads, kv_heads=kv_heads, dim_head=dim_head, out_dim=out_dim)
        if out_dim is not None:
            check_divides("dim_head", dim_head, "out_dim", out_dim)
        self.heads = heads if out_dim is None else out_dim // dim_head
        if kv_heads is not None:
            check_divides("kv_heads", kv_heads, "the number of heads", self.heads)
        self.head_dim = dim_head
        self.inner_dim = dim_head * self.heads
        self.inner_kv_dim = self.inner_dim if kv_heads is None else dim_head * kv_heads
        self.out_dim = self.query_dim if out_dim is None else out_dim
        self.sliceable_head_dim = heads
        self.scale_qk = scale_qk
        self.scale = dim_head**-0.5 if scale_qk else 1.0

    def _check_options(self, qk_norm: str | None) -> None:
        check_one_of("qk_norm", qk_norm, QKNorm.KINDS)
        check_one_of("context_pre_only", self.context_pre_only, (None, True, False))
        if self.added_kv_proj_dim is None:
            name = "only_cross_attention without added_kv_proj_dim"
            check_one_of(name, self.only_cross_attention, (False,))
        else:
            check_one_of("qk_norm with added_kv_proj_dim", qk_norm, QKNorm.CONTEXT_KINDS)
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: got {self.dropout!r}, need a probability")
        if self.rescale_output_factor == 0:
            raise ValueError("rescale_output_factor: got 0, need a divisor")

    def _add_input_norms(self, groups: int | None, spatial: int | None, eps: float) -> None:
        check_positive(spatial_norm_dim=spatial)
        if groups is not None:
            check_divides("norm_num_groups", groups, "query_dim", self.query_dim)
        self.group_norm = None if groups is None else nn.GroupNorm(groups, self.query_dim, eps=eps)
        self.spatial_norm = None if spatial is None else SpatialNorm(self.query_dim, spatial)

    def _context_norm(self, kind: str | None, groups: int) -> nn.LayerNorm | nn.GroupNorm | None:
        check_one_of("cross_attention_norm", kind, (None, "layer_norm", "group_norm"))
        if kind is None:
            return None
        if kind == "layer_norm":
            return nn.LayerNorm(self.cross_attention_dim)
        # Added projections widen the context after this norm, so their input sets its width.
        width = self.added_kv_proj_dim or self.cross_attention_dim
        check_divides("cross_attention_norm_num_groups", groups, "the context's width", width)
        return nn.GroupNorm(groups, width, eps=1e-5)

    def _add_projections(self, out_bias: bool) -> None:
        q, kv = self.inner_dim, self.inner_kv_dim
        bias, added_bias = self.use_bias, bool(self.added_proj_bias)
        context, added = self.cross_attention_dim, self.added_kv_proj_dim

        self.to_q = nn.Linear(self.query_dim, q, bias=bias)
        self.to_k = self.to_v = None
        if not self.only_cross_attention:
            self.to_k = nn.Linear(context, kv, bias=bias)
            self.to_v = nn.Linear(context, kv, bias=bias)

        self.add_q_proj = self.add_k_proj = self.add_v_proj = None
        if added is not None:
            self.add_k_proj = nn.Linear(added, kv, bias=added_bias)
            self.add_v_proj = nn.Linear(added, kv, bias=added_bias)
            if self.context_pre_only is not None:
                self.add_q_proj = nn.Linear(added, q, bias=added_bias)

        self.to_out = self.to_add_out = None
        if not self.pre_only:
            out = nn.Linear(q, self.out_dim, bias=out_bias)
            self.to_out = nn.ModuleList([out, nn.Dropout(self.dropout)])
        if self.context_pre_only is False:
            self.to_add_out = nn.Linear(q, self.out_context_dim, bias=out_bias)

    def _added_norms(self, norm: QKNorm) -> tuple[nn.Module | None, nn.Module | None]:
        if self.added_kv_proj_dim is None:
            return None, None
        if norm.kind == "rms_norm_across_heads":
            # Wan, for which this kind was made, norms no queries of the second stream.
            return None, norm.pair()[1]
        if norm.kind == "rms_norm":
            return replace(norm, affine=True).pair()
        return norm.pair()

    def fuse_projections(self, fuse: bool = True) -> None:
        """Makes one layer of the projections that share an input, or undoes that.

        Self-attention gets `to_qkv`, cross-attention `to_kv`, a second stream with queries
        `to_added_qkv`. The separate layers stay, so that state keys only grow. Undoing copies
        what the fused layers learned back into them and removes the fused ones.

        Args:
            fuse: False to undo. Asking for what is already so does nothing.

        Raises:
            ValueError: a projection isn't a plain linear layer (an adapter or a quantized one).
        """
        if bool(fuse) == self.fused_projections:
            return
        for name, parts in self._fusible().items():
            if fuse:
                setattr(self, name, _joined(parts))
            else:
                _copy_back(getattr(self, name), parts)
                delattr(self, name)
        self.fused_projections = bool(fuse)

    def unfuse_projections(self) -> None:
        """Undoes `fuse_projections`."""
        self.fuse_projections(False)

    def _fusible(self) -> dict[str, dict[str, nn.Module | None]]:
        own, name = ("to_q", "to_k", "to_v"), "to_qkv"
        if self.is_cross_attention:
            own, name = own[1:], "to_kv"
        groups = {name: own}
        if self.add_q_proj is not None:
            groups["to_added_qkv"] = ("add_q_proj", "add_k_proj", "add_v_proj")
        return {
            fused: {part: getattr(self, part) for part in parts} for fused, parts in groups.items()
        }

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Computes attention a few heads at a time; None for all at once.

        Raises:
            ValueError: `slice_size` is more than the number of heads, or the processor is of a
                family that has no sliced one.
        """
        if slice_size is None:
            self._switch("sdpa")
            return
        check_positive(slice_size=slice_size)
        if slice_size > self.sliceable_head_dim:
            raise ValueError(
                f"slice_size: got {slice_size}, possible are 1 to {self.sliceable_head_dim}"
            )
        self._switch("sliced", slice_size=slice_size)

    def set_use_memory_efficient_attention_xformers(
        self,
        use_memory_efficient_attention_xformers: bool,
        attention_op: Callable[..., Any] | None = None,
    ) -> None:
        """Switches to xformers' kernel within the processor's family, or back to torch's.

        Args:
            use_memory_efficient_attention_xformers: False for torch's kernel.
            attention_op: the operator of xformers; None lets it choose.

        Raises:
            ModuleNotFoundError: xformers isn't installed.
            ValueError: the processor is of a family that can't use it.
        """
        if use_memory_efficient_attention_xformers:
            _need("xformers", "pip install xformers")
            self._switch("xformers", attention_op=attention_op)
        else:
            self._switch("sdpa")

    def set_use_npu_flash_attention(self, use_npu_flash_attention: bool) -> None:
        """Switches to torch_npu's kernel within the processor's family, or back to torch's.

        Raises:
            ModuleNotFoundError: torch_npu isn't installed.
            ValueError: the processor is of a family that can't use it.
        """
        if use_npu_flash_attention:
            _need("torch_npu", "pip install torch-npu")
        self._switch("npu" if use_npu_flash_attention else "sdpa")

    def set_use_xla_flash_attention(
        self,
        use_xla_flash_attention: bool,
        partition_spec: tuple[str | None, ...] | None = None,
        is_flux: bool = False,
    ) -> None:
        """Switches to torch_xla's kernel within the processor's family, or back to torch's.

        Args:
            use_xla_flash_attention: False for torch's kernel.
            partition_spec: how SPMD shards q, k and v; None without SPMD.
            is_flux: use Flux's processor, whichever is in use.

        Raises:
            ModuleNotFoundError: torch_xla isn't installed.
            ValueError: the processor is of a family that can't use it.
        """
        if not use_xla_flash_attention:
            self._switch("sdpa")
            return
        _need("torch_xla", "pip install torch-xla")
        if is_flux:
            self.processor = preset("XLAFluxFlashAttnProcessor2_0")(partition_spec)
        else:
            self._switch("xla", partition_spec=partition_spec)

    def _switch(self, backend: str, **options: object) -> None:
        self.processor = switched(self.processor, backend, **options)

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """Splits the heads of [B, N, H*D]: to [B*H, N, D], or [B, H, N, D] for `out_dim=4`.

        A dimension between batch and tokens is counted among the tokens.
        """
        batch, width = tensor.shape[0], tensor.shape[-1] // self.heads
        split = tensor.reshape(batch, -1, self.heads, width).transpose(1, 2)
        return split.flatten(0, 1) if out_dim == 3 else split

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """Merges the heads of [B*H, N, D] to [B, N, H*D]."""
        tokens, width = tensor.shape[1:]
        return tensor.reshape(-1, self.heads, tokens, width).transpose(1, 2).flatten(2)

    def get_attention_scores(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The attention probabilities, in the dtype of `query`.

        Args:
            query: [B*H, Q, D].
            key: [B*H, K, D].
            attention_mask: added to the scores; broadcasts to [B*H, Q, K].

        Returns:
            [B*H, Q, K]; scores and softmax are in fp32 where the module upcasts them.
        """
        q, k = (query.float(), key.float()) if self.upcast_attention else (query, key)
        added = q.new_zeros(1, 1, 1) if attention_mask is None else attention_mask
        scores = torch.baddbmm(added, q, k.transpose(-1, -2), alpha=self.scale)
        if self.upcast_softmax:
            scores = scores.float()
        return scores.softmax(dim=-1).to(query.dtype)

    def prepare_attention_mask(
        self,
        attention_mask: Tensor | None,
        target_length: int,
        batch_size: int,
        out_dim: int = 3,
    ) -> Tensor | None:
        """Repeats an additive mask for each head, in the shape that `out_dim` asks for.

        Args:
            attention_mask: [B, 1 or Q, K].
            target_length: number of keys. A mask of any other length gets that many zeros more:
                added keys come after those that the mask is about.
            batch_size: B; for `out_dim=3`, a mask with a row for each head is left as it is.
            out_dim: 3 for [B*H, ., K], 4 for [B, H, ., K].
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            attention_mask = F.pad(attention_mask, (0, target_length))
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        if out_dim == 3 and attention_mask.shape[0] < batch_size * self.heads:
            return attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask

    def norm_encoder_hidden_states(self, encoder_hidden_states: Tensor) -> Tensor:
        """Applies `norm_cross` over the channels of the context, [B, M, C]."""
        if self.norm_cross is None:
            raise ValueError("cross_attention_norm: got None, so there is no norm to apply")
        if isinstance(self.norm_cross, nn.GroupNorm):
            return self.norm_cross(encoder_hidden_states.transpose(1, 2)).transpose(1, 2)
        return self.norm_cross(encoder_hidden_states)


class MochiAttention(_ContextProcessed):
    """Joint attention of Mochi: two streams, each with norms and projections of its own.

    Args:
        query_dim: channels of the hidden states.
        added_kv_proj_dim: channels of the second stream.
        processor: what computes the attention; None for `MochiAttnProcessor2_0`.
        heads: number of heads.
        dim_head: channels of a head.
        dropout: probability at the output.
        bias: bias of `to_q`, `to_k`, `to_v`.
        added_proj_bias: bias of `add_q_proj`, `add_k_proj`, `add_v_proj`.
        out_dim: channels of the output and of all heads together, a multiple of `dim_head`; None
            for `query_dim` and `heads * dim_head`.
        out_context_dim: channels of the second stream's output; None for `query_dim`.
        out_bias: bias of the output projections.
        context_pre_only: leave out the second stream's output projection.
        eps: of the norms of queries and keys.

    Raises:
        ValueError: an argument is out of range or doesn't go with another.
    """

    norm_q: MochiRMSNorm
    norm_k: MochiRMSNorm
    norm_added_q: MochiRMSNorm
    norm_added_k: MochiRMSNorm
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    add_q_proj: nn.Linear
    add_k_proj: nn.Linear
    add_v_proj: nn.Linear

    def __init__(
        self,
        query_dim: int,
        added_kv_proj_dim: int,
        processor: Callable[..., Any] | None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        added_proj_bias: bool = True,
        out_dim: int | None = None,
        out_context_dim: int | None = None,
        out_bias: bool = True,
        context_pre_only: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_one_of("context_pre_only", context_pre_only, (True, False))
        check_positive(query_dim=query_dim, added_kv_proj_dim=added_kv_proj_dim, heads=heads)
        check_positive(dim_head=dim_head, out_dim=out_dim, out_context_dim=out_context_dim)
        if out_dim is not None:
            check_divides("dim_head", dim_head, "out_dim", out_dim)
        self.heads = heads if out_dim is None else out_dim // dim_head
        self.head_dim = dim_head
        self.inner_dim = dim_head * self.heads
        self.out_dim = out_dim or query_dim
        self.out_context_dim = out_context_dim or query_dim
        self.context_pre_only = context_pre_only

        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, MochiRMSNorm(dim_head, eps))
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(query_dim, self.inner_dim, bias=bias))
        for name in ("add_k_proj", "add_v_proj", "add_q_proj"):
            setattr(self, name, nn.Linear(added_kv_proj_dim, self.inner_dim, bias=added_proj_bias))
        out = nn.Linear(self.inner_dim, self.out_dim, bias=out_bias)
        self.to_out = nn.ModuleList([out, nn.Dropout(dropout)])
        # Absent, not None, without it: diffusers' processor asks whether it is there.
        if not context_pre_only:
            self.to_add_out = nn.Linear(self.inner_dim, self.out_context_dim, bias=out_bias)
        self.processor = preset("MochiAttnProcessor2_0")() if processor is None else processor


class SanaMultiscaleLinearAttention(_Processed):
    """Linear attention of DC-AE over a grid, at several scales (https://arxiv.org/abs/2410.10733).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_attention_heads: number of heads; None for as many as `in_channels` has room for,
            times `mult`.
        attention_head_dim: channels of a head.
        mult: factor of the number of heads.
        norm_type: norm of the output: `"batch_norm"`, `"layer_norm"` or `"rms_norm"`.
        kernel_sizes: odd widths of the neighbourhoods, one a scale.
        eps: added to the divisor of linear attention.
        residual_connection: add the input to the output.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_attention_heads: int | None = None,
        attention_head_dim: int = 8,
        mult: float = 1.0,
        norm_type: str = "batch_norm",
        kernel_sizes: Sequence[int] = (5,),
        eps: float = 1e-15,
        residual_connection: bool = False,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels)
        check_positive(attention_head_dim=attention_head_dim)
        room = int(in_channels // attention_head_dim * mult)
        heads = room if num_attention_heads is None else num_attention_heads
        check_positive(num_attention_heads=heads)
        self.eps = eps
        self.attention_head_dim = attention_head_dim
        self.norm_type = norm_type
        self.residual_connection = residual_connection

        width = heads * attention_head_dim
        self.to_q = nn.Linear(in_channels, width, bias=False)
        self.to_k = nn.Linear(in_channels, width, bias=False)
        self.to_v = nn.Linear(in_channels, width, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            SanaMultiscaleAttentionProjection(width, heads, size) for size in kernel_sizes
        )
        self.nonlinearity = nn.ReLU()
        self.to_out = nn.Linear(width * (1 + len(kernel_sizes)), out_channels, bias=False)
        self.norm_out = normalization(norm_type, out_channels)
        self.processor = preset("SanaMultiscaleAttnProcessor2_0")()

    # The next two are here for diffusers' processor, which has its formulas on the module.
    def apply_linear_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Linear attention of non-negative queries and keys, all [B, H, D, N]; in fp32."""
        counted = F.pad(value, (0, 0, 0, 1), value=1.0)
        sums = (counted @ key.mT @ query).float()
        return sums[:, :, :-1] / (sums[:, :, -1:] + self.eps)

    def apply_quadratic_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same through its [N, N] weights, for grids of few tokens."""
        weights = (key.mT @ query).float()
        weights = weights / (weights.sum(dim=2, keepdim=True) + self.eps)
        return value @ weights.to(value.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Runs the processor on `hidden_states`, [B, C, H, W]."""
        return self.processor(self, hidden_states)


def _default_processor() -> Callable[..., Any]:
    # Presets import nothing from here, but the package imports both.
    from .presets.unet import AttnProcessor2_0

    return AttnProcessor2_0()


@torch.no_grad()
def _joined(parts: Mapping[str, nn.Module | None]) -> nn.Linear:
    """One linear layer that computes all of `parts`, one after another."""
    linears: list[nn.Linear] = []
    for name, part in parts.items():
        if not isinstance(part, nn.Linear) or not part.weight.is_floating_point():
            raise ValueError(f"{name}: got {type(part).__name__}, can only fuse a plain nn.Linear")
        linears.append(part)
    weight = torch.cat([linear.weight for linear in linears])
    has_bias = cast("Tensor | None", linears[0].bias) is not None
    like = linears[0].weight
    joined = nn.Linear(
        weight.shape[1], weight.shape[0], bias=has_bias, device=like.device, dtype=like.dtype
    )
    joined.weight.copy_(weight)
    if has_bias:
        joined.bias.copy_(torch.cat([linear.bias for linear in linears]))
    return joined.requires_grad_(like.requires_grad)


@torch.no_grad()
def _copy_back(joined: nn.Linear, parts: Mapping[str, nn.Module | None]) -> None:
    """Writes the rows of `joined` to the layers that it was made of."""
    start = 0
    for part in parts.values():
        linear = cast(nn.Linear, part)
        rows = slice(start, start + linear.weight.shape[0])
        linear.weight.copy_(joined.weight[rows])
        if cast("Tensor | None", linear.bias) is not None:
            linear.bias.copy_(joined.bias[rows])
        start = rows.stop
