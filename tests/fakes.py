"""Stand-ins for attention packages that need hardware: they record, refuse, and compute in torch.

Each has the real function's arguments, refuses what the real one refuses, and returns what it is
documented to return, so that an adapter is tested for layout, scale and mask on any machine. What
the packages of `attnproc.verify.fakes` compute is computed there. A
fixture puts each under the package's name for one test::

    def test_it(fake_xformers):
        ...
        assert fake_xformers.calls[-1]["scale"] == 0.5

`device_sizes = True` on a fake also refuses the sizes that only the real kernel minds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnproc.verify import fakes as plain

__all__ = [
    "FakeAiter",
    "FakeFlash",
    "FakeHub",
    "FakeSage",
    "FakeSage3",
    "FakeTorchNPU",
    "FakeTorchXLA",
    "FakeXFormers",
    "fake_flash",
    "fake_flash3",
    "fake_flash4",
    "fake_hub",
    "fake_sage",
    "fake_torch_npu",
    "fake_torch_xla",
    "fake_varlen",
    "fake_xformers",
]


def _install(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None = None, **contents: object
) -> ModuleType:
    """Puts a module of that name in place, inside its parent if it has one."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    if version is not None:
        module.__version__ = version
    for key, value in contents.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


def _refuse(error: type[Exception], **broken: bool) -> None:
    for reason, holds in broken.items():
        if holds:
            raise error(reason.replace("_", " "))


def _weighted(scores: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return (weights @ value.to(weights.dtype)).to(value.dtype)


def _causal(scores: Tensor, *, bottom_right: bool = False) -> Tensor:
    queries, keys = scores.shape[-2:]
    shift = keys - queries if bottom_right else 0
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1 + shift)
    return scores.masked_fill(future, float("-inf"))


class LowerTriangularMask:
    """xformers' causal mask: query i sees keys 0 to i."""


class FakeXFormers:
    """`xformers.ops.memory_efficient_attention`; `calls` has one dict of arguments a call.

    As the real one: [B, M, H, K], [B, M, K] or [B, M, G, H, K], all alike, nothing broadcast. A
    bias is floating, of the dtype of the query, of the full shape of the scores (a view made by
    `expand` will do) and aligned: its strides but the last are multiples of 16 bytes.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.device_sizes = False

    def memory_efficient_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | LowerTriangularMask | None = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: tuple[Any, Any] | None = None,
    ) -> Tensor:
        self.calls.append(
            {
                "query": query,
                "key": key,
                "value": value,
                "attn_bias": attn_bias,
                "p": p,
                "scale": scale,
                "op": op,
            }
        )
        self._check(query, key, value, p)
        heads = query.shape[2:-1]
        queries, keys = query.shape[1], key.shape[1]
        scores = (query.shape[0], *heads, queries, keys)
        if isinstance(attn_bias, LowerTriangularMask):
            attn_bias = _causal(query.new_zeros(1).expand(scores))
        elif attn_bias is not None:
            self._bias(attn_bias, query, scores)
        if len(heads) == 2:
            query, key, value = (x.flatten(2, 3) for x in (query, key, value))
            attn_bias = attn_bias if attn_bias is None else attn_bias.flatten(1, 2)
        out = plain.memory_efficient_attention(query, key, value, attn_bias, p, scale)
        return out.unflatten(2, heads) if len(heads) == 2 else out

    def _check(self, query: Tensor, key: Tensor, value: Tensor, p: float) -> None:
        inputs = (query, key, value)
        lead = (query.shape[0], *query.shape[2:-1])
        alignment = 128 // torch.finfo(query.dtype).bits
        _refuse(
            ValueError,
            query_key_value_need_the_same_3_to_5_dimensions=query.ndim not in (3, 4, 5)
            or any(x.ndim != query.ndim for x in inputs),
            query_key_value_need_one_dtype=len({x.dtype for x in inputs}) > 1,
            query_key_value_need_one_batch_and_heads=any(
                (x.shape[0], *x.shape[2:-1]) != lead for x in inputs
            ),
            key_and_value_need_one_length=key.shape[1] != value.shape[1],
            query_and_key_need_one_width=query.shape[-1] != key.shape[-1],
            dropout_is_no_probability=not 0 <= p <= 1,
        )
        _refuse(
            NotImplementedError,
            double_precision_is_not_supported=query.dtype == torch.float64,
            last_stride_is_not_1=any(x.stride(-1) > 1 for x in inputs),
            head_dimension_is_not_aligned=self.device_sizes
            and any(x.shape[-1] % alignment for x in inputs),
        )

    def _bias(self, bias: object, query: Tensor, scores: tuple[int, ...]) -> None:
        if not isinstance(bias, Tensor):
            raise NotImplementedError(f"attn_bias type is {type(bias)}")
        _refuse(
            ValueError,
            attn_bias_needs_the_dtype_of_the_query=bias.dtype != query.dtype,
            attn_bias_needs_the_full_shape_of_the_scores=bias.shape != scores,
        )
        alignment = 128 // torch.finfo(bias.dtype).bits
        _refuse(
            NotImplementedError,
            attn_bias_strides_are_not_aligned=any(s % alignment for s in bias.stride()[:-1]),
            attn_bias_last_stride_is_not_1=bias.stride(-1) > 1,
        )


class FakeTorchNPU:
    """`torch_npu.npu_fusion_attention` for layouts BNSD and BSND; `calls` as above.

    As the real one: True in `atten_mask` discards, its shape is [B, N, Sq, Skv], [B, 1, Sq, Skv],
    [1, 1, Sq, Skv] or [Sq, Skv]; `scale` is 1 unless given and multiplies scores and `pse` alike,
    so a bias b goes in as b / scale; key heads divide query heads; seven values are returned.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.device_sizes = False

    def npu_fusion_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_num: int,
        input_layout: str,
        pse: Tensor | None = None,
        padding_mask: Tensor | None = None,
        atten_mask: Tensor | None = None,
        scale: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = 2147483647,
        next_tockens: int = 2147483647,
        inner_precise: int = 0,
        prefix: list[int] | None = None,
        actual_seq_qlen: list[int] | None = None,
        actual_seq_kvlen: list[int] | None = None,
        sparse_mode: int = 0,
        gen_mask_parallel: bool = True,
        sync: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
        given = {name: value for name, value in locals().items() if name != "self"}
        self.calls.append(given)
        self._check(given)
        swap = input_layout == "BSND"
        q, k, v = (x.transpose(1, 2) if swap else x for x in (query, key, value))
        self._check_heads(q, k, head_num)
        shape = (*q.shape[:3], k.shape[2])
        self._check_pse(pse, q.dtype, shape)
        self._check_mask(atten_mask, sparse_mode, shape)
        if sparse_mode:
            seen = _causal(torch.zeros(shape[2:]), bottom_right=sparse_mode == 3)
            atten_mask = seen == float("-inf")
        out, *rest = plain.npu_fusion_attention(
            q,
            k,
            v,
            head_num,
            "BNSD",
            pse=pse,
            atten_mask=atten_mask,
            scale=scale,
            keep_prob=keep_prob,
        )
        return (out.transpose(1, 2) if swap else out, *rest)

    def _check(self, given: dict[str, Any]) -> None:
        query, key, value = given["query"], given["key"], given["value"]
        width = query.shape[-1]
        _refuse(
            RuntimeError,
            this_fake_knows_layouts_BNSD_and_BSND=given["input_layout"] not in ("BNSD", "BSND"),
            this_fake_knows_sparse_modes_0_2_and_3=given["sparse_mode"] not in (0, 2, 3),
            padding_mask_is_not_supported=given["padding_mask"] is not None,
            sequence_lengths_are_for_layout_TND=given["actual_seq_qlen"] is not None
            or given["actual_seq_kvlen"] is not None,
            prefix_is_for_sparse_mode_5=given["prefix"] is not None,
            query_key_value_need_four_dimensions=any(x.ndim != 4 for x in (query, key, value)),
            query_key_value_need_one_dtype=len({x.dtype for x in (query, key, value)}) > 1,
            double_precision_is_not_supported=query.dtype == torch.float64,
            key_and_value_need_one_shape=key.shape != value.shape,
            keep_prob_is_no_probability=not 0 < given["keep_prob"] <= 1,
            head_dimension_is_over_512=width > 512,
            head_dimension_is_no_multiple_of_16=self.device_sizes and width % 16 != 0,
        )

    def _check_heads(self, q: Tensor, k: Tensor, head_num: int) -> None:
        _refuse(
            RuntimeError,
            head_num_is_not_the_number_of_query_heads=q.shape[1] != head_num,
            key_heads_do_not_divide_query_heads=q.shape[1] % k.shape[1] != 0,
            batch_or_width_differ=q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1],
        )

    def _check_pse(self, pse: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        batch, heads, queries, keys = shape
        shapes = (shape, (batch, heads, 1, keys), (1, heads, queries, keys))
        _refuse(
            RuntimeError,
            pse_is_not_BNSS_BN1S_or_1NSS=pse is not None and tuple(pse.shape) not in shapes,
            pse_needs_the_dtype_of_the_query=pse is not None and pse.dtype != dtype,
        )

    def _check_mask(self, mask: Tensor | None, sparse_mode: int, shape: tuple[int, ...]) -> None:
        batch, heads, *inner = shape
        shapes = [(*lead, *inner) for lead in ((batch, heads), (batch, 1), (1, 1), ())]
        compressed = sparse_mode > 0
        given = mask is not None
        _refuse(
            RuntimeError,
            atten_mask_is_neither_bool_nor_uint8=given
            and mask.dtype not in (torch.bool, torch.uint8),
            sparse_modes_2_and_3_need_the_compressed_mask=compressed
            and (not given or tuple(mask.shape) != (2048, 2048)),
            atten_mask_is_not_BNSS_B1SS_11SS_or_SS=given
            and not compressed
            and tuple(mask.shape) not in shapes,
        )


class FakeTorchXLA:
    """`torch_xla.experimental.custom_kernel.flash_attention`; `calls` as above.

    As the real one: [B, H, S, D] with as many key as query heads; `sm_scale` is 1 unless given
    and multiplies scores and `ab` alike, so a bias b goes in as b / sm_scale; `ab` has the full
    shape of the scores; segment ids come both or not at all, and tokens see their own segment.
    `spmd` is what `torch_xla.runtime.is_spmd()` answers.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.device_sizes = False
        self.spmd = False

    def is_spmd(self) -> bool:
        return self.spmd

    def flash_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        q_segment_ids: Tensor | None = None,
        kv_segment_ids: Tensor | None = None,
        sm_scale: float = 1.0,
        *,
        ab: Tensor | None = None,
        partition_spec: tuple[str | None, ...] | None = None,
        mesh: Any = None,
    ) -> Tensor:
        given = {name: value for name, value in locals().items() if name != "self"}
        self.calls.append(given)
        self._check(given)
        if q_segment_ids is not None and kv_segment_ids is not None:
            other = q_segment_ids[:, None, :, None] != kv_segment_ids[:, None, None, :]
            hidden = torch.zeros(()).masked_fill(other, torch.finfo(torch.float32).min)
            ab = hidden if ab is None else ab + hidden
        return plain.flash_attention(q, k, v, causal, sm_scale=sm_scale, ab=ab)

    def _check(self, given: dict[str, Any]) -> None:
        q, k, v, ab = given["q"], given["k"], given["v"], given["ab"]
        ids = (given["q_segment_ids"], given["kv_segment_ids"])
        lengths = (q.shape[-2], k.shape[-2])
        _refuse(
            ValueError,
            q_k_v_need_four_dimensions=any(x.ndim != 4 for x in (q, k, v)),
            k_and_v_need_one_shape=k.shape != v.shape,
            q_and_k_need_one_batch_heads_and_width=(*q.shape[:2], q.shape[-1])
            != (*k.shape[:2], k.shape[-1]),
            ab_needs_the_full_shape_of_the_scores=ab is not None
            and tuple(ab.shape) != (*q.shape[:2], *lengths),
            segment_ids_come_both_or_not_at_all=(ids[0] is None) != (ids[1] is None),
            segment_ids_need_batch_and_length=any(
                x is not None and tuple(x.shape) != (q.shape[0], length)
                for x, length in zip(ids, lengths, strict=True)
            ),
            a_partition_spec_names_four_dimensions=given["partition_spec"] is not None
            and len(given["partition_spec"]) != 4,
        )
        _refuse(
            NotImplementedError,
            lengths_over_512_are_multiples_of_512=self.device_sizes
            and any(length % min(512, length) for length in lengths),
            keys_with_segment_ids_are_a_multiple_of_128=self.device_sizes
            and ids[1] is not None
            and lengths[1] % 128 != 0,
        )


class FakeFlash:
    """`flash_attn_func` and `flash_attn_varlen_func` of flash-attn 2, 3 or 4; `calls` as above.

    As the real ones: [B, S, H, D] or packed [tokens, H, D]; causal and windows count from the end
    of both sequences; key heads divide query heads; half precision alone on a device. Version 2
    has dropout, and gives (output, lse, probabilities) if `return_attn_probs`; version 3 has no
    dropout; version 4 writes no limit as None, and gives (output, lse) always. A packed sequence
    without keys gives zeros and lse = inf.
    """

    def __init__(self, version: int = 2) -> None:
        self.version, self.has_windows = version, True
        self.calls: list[dict[str, Any]] = []

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The module's functions, with the arguments that this version has."""
        if self.version == 4:

            def flash_attn_func(
                q, k, v, softmax_scale=None, causal=False, window_size=(None, None),
                return_lse=False,
            ):  # fmt: skip
                return self._run(q, k, v, softmax_scale, window_size, lse=True)

            def flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                max_seqlen_k=None, softmax_scale=None, causal=False, window_size=(None, None),
                return_lse=False,
            ):  # fmt: skip
                starts = (cu_seqlens_q, cu_seqlens_k)
                return self._packed(q, k, v, starts, softmax_scale, window_size, lse=True)

        elif self.version == 3:

            def flash_attn_func(
                q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1),
                return_attn_probs=False,
            ):  # fmt: skip
                return self._run(q, k, v, softmax_scale, window_size, lse=return_attn_probs)

            def flash_attn_varlen_func(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False,
            ):  # fmt: skip
                starts = (cu_seqlens_q, cu_seqlens_k)
                lse = return_attn_probs
                return self._packed(q, k, v, starts, softmax_scale, window_size, lse=lse)

        else:

            def flash_attn_func(
                q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
            ):  # fmt: skip
                self.dropout = dropout_p
                got = self._run(q, k, v, softmax_scale, window_size, lse=return_attn_probs)
                return (*got, None) if return_attn_probs else got

            def flash_attn_varlen_func(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                alibi_slopes=None, deterministic=False, return_attn_probs=False,
            ):  # fmt: skip
                starts = (cu_seqlens_q, cu_seqlens_k)
                lse = return_attn_probs
                got = self._packed(q, k, v, starts, softmax_scale, window_size, lse=lse)
                return (*got, None) if lse else got

        functions = (flash_attn_func, flash_attn_varlen_func)
        return {function.__name__: function for function in functions}

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: Any, *, lse: bool
    ) -> Any:
        self.calls.append({"q": q, "k": k, "v": v, "softmax_scale": scale, "window_size": window})
        _refuse(
            RuntimeError,
            needs_four_dimensions=any(x.ndim != 4 for x in (q, k, v)),
            widths_differ=not q.shape[-1] == k.shape[-1] == v.shape[-1],
            key_heads_do_not_divide_query_heads=q.shape[2] % k.shape[2] != 0,
        )
        out, total = self._attend(*(x.transpose(1, 2) for x in (q, k, v)), scale, window)
        out = out.transpose(1, 2)
        return (out, total) if lse else out

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: tuple[Tensor, Tensor],
        scale: float | None,
        window: Any,
        *,
        lse: bool,
    ) -> Any:
        self.calls.append({"q": q, "k": k, "v": v, "cu_seqlens_k": starts[1]})
        _refuse(
            RuntimeError,
            needs_three_dimensions=any(x.ndim != 3 for x in (q, k, v)),
            starts_are_not_int32=any(x.dtype != torch.int32 for x in starts),
        )
        outs, totals = torch.zeros_like(q), q.new_full(q.shape[1::-1], torch.inf).float()
        spans = zip(
            *(zip(x[:-1].tolist(), x[1:].tolist(), strict=True) for x in starts), strict=True
        )
        for (first, last), (low, high) in spans:
            if high > low:
                part = (x.transpose(0, 1)[None] for x in (q[first:last], k[low:high], v[low:high]))
                out, total = self._attend(*part, scale, window)
                outs = torch.cat((outs[:first], out[0].transpose(0, 1), outs[last:]))
                totals[:, first:last] = total[0]
        return (outs, totals) if lse else outs

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: Any
    ) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
        left, right = (None if n in (None, -1) else n for n in window)
        shift = k.shape[2] - q.shape[2]
        i = torch.arange(q.shape[2])[:, None] + shift
        j = torch.arange(k.shape[2])
        if left is not None:
            scores = scores.masked_fill(j < i - left, -torch.inf)
        if right is not None:
            scores = scores.masked_fill(j > i + right, -torch.inf)
        return _weighted(scores, v), scores.logsumexp(-1)


class FakeSage:
    """`sageattention`: exact here, and it takes any further argument without a word.

    As the real one: `tensor_layout` HND is [B, H, S, D] and the other is [B, S, H, D]; the scale
    is ``D ** -0.5`` unless `sm_scale` is given; causal counts from the start of both sequences.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def sageattn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Any:
        self.calls.append({"layout": tensor_layout, "sm_scale": sm_scale, "kwargs": kwargs})
        if tensor_layout == "NHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
        scores = _causal(scores) if is_causal else scores
        out = _weighted(scores, v)
        out = out.transpose(1, 2) if tensor_layout == "NHD" else out
        return (out, scores.logsumexp(-1)) if return_lse else out

    def sageattn_varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        is_causal: bool = False,
        sm_scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        self.calls.append({"layout": "packed", "sm_scale": sm_scale, "kwargs": kwargs})
        window = (-1, 0) if is_causal else (-1, -1)
        starts = (cu_seqlens_q, cu_seqlens_k)
        return FakeFlash()._packed(q, k, v, starts, sm_scale, window, lse=False)


class FakeSage3:
    """`sageattn3_blackwell`: exact here; any further argument is taken without a word.

    As the real one: [B, H, S, D] in half precision (single is let pass here), 64 or 128 channels,
    as many key as query heads; the scale is ``D ** -0.5`` whatever is given; a mask is ignored;
    the mean of the keys is taken off them in place.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def sageattn3_blackwell(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        per_block_mean: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        self.calls.append({"attn_mask": attn_mask, "is_causal": is_causal, "kwargs": kwargs})
        _refuse(
            RuntimeError,
            channels_are_not_64_or_128=q.shape[-1] not in (64, 128),
            heads_differ=q.shape[1] != k.shape[1],
        )
        k -= k.mean(dim=-2, keepdim=True)
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
        return _weighted(_causal(scores) if is_causal else scores, v)


class FakeAiter:
    """`flash_attn_func` of AITER: bfloat16 alone, forward alone; `calls` as above.

    As the real one: [B, S, H, D]; masks count from the end of both sequences; gives the output,
    then the log-sum-exp if `return_lse`, then probabilities if `return_attn_probs`.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        bias=None, alibi_slopes=None, deterministic=True, return_lse=False,
        return_attn_probs=False,
    ) -> Any:  # fmt: skip
        self.calls.append({"softmax_scale": softmax_scale, "window_size": window_size})
        _refuse(RuntimeError, invalid_argument_for_fmha_fwd=q.dtype != torch.bfloat16)
        window = (window_size[0], 0) if causal else window_size
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        out, lse = FakeFlash()._attend(q, k, v, softmax_scale, window)
        out = out.transpose(1, 2).bfloat16()
        found = [out, *([lse] if return_lse else []), *([None] if return_attn_probs else [])]
        return tuple(found) if len(found) > 1 else out


class FakeHub:
    """`kernels.get_kernel`: hands out the fake of a repository, and notes what was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.flash, self.sage, self.sage3 = FakeFlash(2), FakeSage(), FakeSage3()
        self.aiter = FakeAiter()

    def get_kernel(self, repo_id: str, revision: str | None = None, **options: Any) -> ModuleType:
        self.calls.append((repo_id, revision))
        functions: dict[str, dict[str, Any]] = {
            "kernels-community/flash-attn2": self.flash.functions,
            "kernels-community/aiter-flash-attn-ck": {
                "flash_attn_func": self.aiter.flash_attn_func
            },
            "SageAttention/sage-attention": {"sageattn": self.sage.sageattn},
            "SageAttention/sage-blackwell": {
                "sageattn3_blackwell": self.sage3.sageattn3_blackwell
            },
        }
        module = ModuleType(repo_id)
        module.__dict__.update(functions[repo_id])
        return module


@pytest.fixture
def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> FakeXFormers:
    """A `FakeXFormers` under the name `xformers` for one test."""
    fake = FakeXFormers()
    _install(monkeypatch, "xformers", "0.0.35")
    _install(
        monkeypatch,
        "xformers.ops",
        memory_efficient_attention=fake.memory_efficient_attention,
        LowerTriangularMask=LowerTriangularMask,
    )
    return fake


@pytest.fixture
def fake_torch_npu(monkeypatch: pytest.MonkeyPatch) -> FakeTorchNPU:
    """A `FakeTorchNPU` under the name `torch_npu` for one test."""
    fake = FakeTorchNPU()
    _install(monkeypatch, "torch_npu", "2.14.0", npu_fusion_attention=fake.npu_fusion_attention)
    return fake


@pytest.fixture
def fake_torch_xla(monkeypatch: pytest.MonkeyPatch) -> FakeTorchXLA:
    """A `FakeTorchXLA` under the name `torch_xla` for one test."""
    fake = FakeTorchXLA()
    kernel: Callable[..., Tensor] = fake.flash_attention
    _install(monkeypatch, "torch_xla", "2.9.0")
    _install(monkeypatch, "torch_xla.runtime", is_spmd=fake.is_spmd)
    _install(monkeypatch, "torch_xla.experimental")
    _install(monkeypatch, "torch_xla.experimental.custom_kernel", flash_attention=kernel)
    return fake


@pytest.fixture
def fake_flash(monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    """A `FakeFlash` of version 2 under the name `flash_attn` for one test."""
    fake = FakeFlash(2)
    _install(monkeypatch, "flash_attn", "2.8.3", **fake.functions)
    return fake


@pytest.fixture
def fake_flash3(monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    """A `FakeFlash` of version 3 under the name `flash_attn_interface` for one test."""
    fake = FakeFlash(3)
    _install(monkeypatch, "flash_attn_interface", "3.0.0", **fake.functions)
    return fake


@pytest.fixture
def fake_flash4(monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    """A `FakeFlash` of version 4 under the name `flash_attn.cute` for one test."""
    fake = FakeFlash(4)
    _install(monkeypatch, "flash_attn")
    _install(monkeypatch, "flash_attn.cute", "4.0.0", **fake.functions)
    return fake


@pytest.fixture(params=["2.10", "2.13"])
def fake_varlen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeFlash:
    """A `FakeFlash` as torch's `varlen_attn`, with the arguments of two versions of torch."""
    from torch.nn.attention import varlen

    fake = FakeFlash(2)

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        window = (-1, 0 if is_causal else -1)
        return fake._packed(query, key, value, (cu_seq_q, cu_seq_k), None, window, lse=True)

    def new(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False,
    ):  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        starts = (cu_seq_q, cu_seq_k)
        return fake._packed(query, key, value, starts, scale, window_size, lse=True)

    monkeypatch.setattr(varlen, "varlen_attn", old if request.param == "2.10" else new)
    fake.has_windows = request.param != "2.10"
    return fake


@pytest.fixture
def fake_sage(monkeypatch: pytest.MonkeyPatch) -> FakeSage:
    """A `FakeSage` under the name `sageattention` for one test."""
    fake = FakeSage()
    functions = {
        "sageattn": fake.sageattn,
        "sageattn_qk_int8_pv_fp16_cuda": fake.sageattn,
        "sageattn_varlen": fake.sageattn_varlen,
    }
    _install(monkeypatch, "sageattention", "2.2.0", **functions)
    return fake


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A `FakeHub` under the name `kernels` for one test."""
    fake = FakeHub()
    _install(monkeypatch, "kernels", "0.17.2", get_kernel=fake.get_kernel)
    return fake
