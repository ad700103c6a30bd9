"""What follows from the layout of the tensors of one step of FlashInfer attention."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch
from shardwise.ops.attention.checks import Heads, check_tokens, default_scale, shape
from shardwise.ops.attention.planner import Planner, exact_metadata, planner
from shardwise.ops.devices import require_one_device
from shardwise.ops.triton_support import dependent_launch
from shardwise.plan_cache import allocator

OP = "flashinfer_attention_mha_with_cache"
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, eq=False)
class Parameters:
    """What FlashInfer's plan depends on besides the batch; `parameters_of` gives one object for equal ones."""

    heads: Heads
    page_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    scale: float

    def plan_arguments(self) -> dict:
        return {
            "num_qo_heads": self.heads.queries,
            "num_kv_heads": self.heads.keys,
            "page_size": self.page_size,
            "q_data_type": self.dtype,
            "kv_data_type": self.cache_dtype,
            "sm_scale": self.scale,
        }


parameters_of = functools.cache(Parameters)
Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)  # whose fields are read faster than a named tuple's
class AttentionPlan:
    """What follows from the layout of a step's tensors."""

    parameters: Parameters
    owner: Planner
    """Of the tensors' device"""
    tokens: int
    """T, padding included"""
    used: int
    """Tokens without padding"""
    full: bool
    """Whether there are tokens, and no padding"""
    out: Callable[[], Tensor]
    """Allocates the result"""
    q_sizes: Sizes
    q_strides: Sizes
    """[count, N, D] of the batch's own tokens, contiguous"""
    k_sizes: Sizes
    k_strides: Sizes
    pages: int
    """Of the cache"""
    half_sizes: Sizes
    half_strides: Sizes
    """Of the cache's keys, and of its values"""
    values: int
    """Elements before the first of these"""
    dense: bool
    """Whether q, k, v and the cache are contiguous"""
    exact: bool
    """Whether no metadata has entries beyond the batch"""
    quantised: bool
    pdl: bool
    """Whether kernels start while their predecessors drain, which FlashInfer would find out again"""


def plan_step(
    batch: Batch, scale: float | None, q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor, indices: Tensor,
    positions: Tensor, indptr: Tensor, last: Tensor,
) -> AttentionPlan:  # fmt: skip
    """Raises TypeError and ValueError for what does not fit together."""
    require_one_device(OP, q, k, v, kv_cache, indices, positions, indptr, last)
    if kv_cache.dim() != 5 or kv_cache.shape[1] != 2:
        raise ValueError(f"{OP}: kv_cache has shape {shape(kv_cache)}; legal: [pages, 2, Nkv, page_size, D]")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{OP}: q is {q.dtype}; legal: float16, bfloat16")
    if kv_cache.dtype not in (q.dtype, FP8):
        raise TypeError(f"{OP}: kv_cache is {kv_cache.dtype}; legal: q's {q.dtype} or float8_e4m3fn")
    kv_heads, page_size, size = kv_cache.shape[2:]
    if size not in (64, 128, 256):
        raise ValueError(
            f"{OP}: head size {size}; legal: 64, 128, 256; or call triton_attention_flattened_mha_with_cache"
        )
    heads = Heads(check_tokens(OP, "q", q.shape, q.shape, size), kv_heads, size, size)
    for name, each in (("k", k), ("v", v)):
        if check_tokens(OP, name, each.shape, q.shape, size) != kv_heads or each.dtype != q.dtype:
            raise ValueError(
                f"{OP}: {name} is {shape(each)} {each.dtype}; legal: {kv_heads} heads of size {size}, {q.dtype}"
            )
    if kv_heads == 0 or heads.queries % kv_heads:
        raise ValueError(f"{OP}: {heads.queries} query heads over {kv_heads} KV heads; legal: a multiple")
    tokens, count = q.shape[0] * q.shape[1], batch.tokens
    if count > tokens:
        raise ValueError(f"{OP}: batch_info_host counts {count} tokens, q holds {tokens}")
    return AttentionPlan(
        parameters_of(heads, page_size, q.dtype, kv_cache.dtype, default_scale(scale, size)),
        planner("attention", q.device),
        tokens,
        count,
        0 < count == tokens,
        allocator(tuple(q.shape), q.dtype, q.device),
        (count, heads.queries, size),
        (heads.queries * size, size, 1),
        (count, kv_heads, size),
        (kv_heads * size, size, 1),
        len(kv_cache),
        tuple(kv_cache.shape[d] for d in (0, 2, 3, 4)),
        tuple(kv_cache.stride(d) for d in (0, 2, 3, 4)),
        kv_cache.stride(1),
        all(each.is_contiguous() for each in (q, k, v, kv_cache)),
        exact_metadata(batch, indices, positions, indptr, last),
        kv_cache.dtype == FP8,
        dependent_launch(q.device),
    )
