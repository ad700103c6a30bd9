"""What follows from the layout of the tensors of one FlashInfer MLA step, and copies of those that it cannot read."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shardwise.ops.attention.batch import Batch
from shardwise.ops.attention.checks import shape
from shardwise.ops.attention.flashinfer_step import FP8
from shardwise.ops.attention.planner import Planner, exact_metadata, planner
from shardwise.ops.devices import require_one_device
from shardwise.ops.mla.absorb import Factor, Product, Rows, head_product
from shardwise.ops.mla.checks import LatentHeads, check_latent
from shardwise.ops.mla.expand import Expanded, expanding
from shardwise.ops.triton_support import dependent_launch
from shardwise.ops.vector_access import takes_vectors
from shardwise.plan_cache import View, allocator

OP = "flashinfer_mla_with_cache"


@dataclass(frozen=True, eq=False)
class Parameters:
    """What FlashInfer's plan depends on besides the batch; equal ones are one object, found quickly."""

    heads: LatentHeads
    page_size: int
    dtype: torch.dtype
    scale: float


parameters_of = functools.cache(Parameters)


class Absorbed(NamedTuple):
    """Tokens whose queries and outputs absorb the weight."""

    latents: Callable[[], torch.Tensor]
    """Allocates the queries' latents [tokens, N, R]"""
    absorb: Product
    """q_nope by the weight's [N, Dn, R] into these"""
    rotated: View
    """q_pe as [tokens, N, Dr]"""
    release: Product
    """Attention's latents by the weight's [N, R, Dv] into the result"""


@dataclass(frozen=True, slots=True)  # whose fields are read faster than a named tuple's
class MlaPlan:
    """What follows from the layout of a step's tensors."""

    parameters: Parameters
    owner: Planner
    """Of the tensors' device"""
    tokens: int
    """T, padding included"""
    full: bool
    """Whether there are tokens, and no padding"""
    out: Callable[[], torch.Tensor]
    """Allocates the result"""
    exact: bool
    """Whether no metadata has entries beyond the batch"""
    readable: bool
    """Whether all are read in place where they are aligned; else copies must be made (`readable_copies`)"""
    quantised: bool
    pdl: bool
    """Whether kernels start while their predecessors drain, which FlashInfer would find out again"""
    latent: View
    """compressed_kv as [tokens, R]"""
    rotated: View
    """kpe as [tokens, Dr]"""
    prompts: View
    """The result of the prefill tokens, [T, N, Dv]"""
    expanded: Expanded
    prefill: Absorbed
    decode: Absorbed


def plan_step(
    batch: Batch, scale: float | None, kv_lora_rank: int, q_nope, q_pe, compressed_kv, kpe, weight, ckv_cache,
    kpe_cache, indices, positions, indptr, last,
) -> MlaPlan:  # fmt: skip
    """Raises TypeError and ValueError for what does not fit together."""
    require_one_device(
        OP, q_nope, q_pe, compressed_kv, kpe, weight, ckv_cache, kpe_cache, indices, positions, indptr, last
    )
    heads = check_latent(OP, q_nope, q_pe, compressed_kv, kpe, weight)
    _check_step(heads, kv_lora_rank, q_nope, ckv_cache, kpe_cache)
    check_caches(ckv_cache, kpe_cache)
    (b, s), count = q_nope.shape[:2], batch.tokens
    if count > b * s:
        raise ValueError(f"{OP}: batch_info_host counts {count} tokens, q_nope holds {b * s}")
    strides = [_token_stride(each) for each in (q_nope, compressed_kv, kpe)]
    q_t, latent_t, kpe_t = (stride or 0 for stride in strides)
    queries, quantised = Rows(q_t, q_nope.stride(2)), ckv_cache.dtype == FP8

    def absorbed(first: int, tokens: int) -> Absorbed:
        return absorbing(heads, weight, queries._replace(before=first), first, tokens, q_nope)

    return MlaPlan(
        parameters_of(heads, ckv_cache.shape[1], q_nope.dtype, heads.scale(scale)),
        planner("mla", q_nope.device),
        b * s,
        0 < count == b * s,
        allocator((b, s, heads.count, heads.value), q_nope.dtype, q_nope.device),
        exact_metadata(batch, indices, positions, indptr, last),
        # Rows of FlashInfer's begin at multiples of 16 bytes; queries are read by a product, from anywhere.
        None not in strides and not (latent_t | kpe_t) % 8 and q_pe.is_contiguous(),
        quantised,
        dependent_launch(q_nope.device),
        ((count, heads.rank), (latent_t, 1), 0),
        ((count, heads.rope), (kpe_t, 1), 0),
        ((batch.prefill_tokens, heads.count, heads.value), (heads.count * heads.value, heads.value, 1), 0),
        expanding(heads, queries, heads.rope if quantised else kpe_t, batch.prefill_tokens, q_nope),
        absorbed(0, batch.prefill_tokens),
        absorbed(batch.prefill_tokens, batch.decode),
    )


def _check_step(heads: LatentHeads, kv_lora_rank: int, q_nope, ckv_cache, kpe_cache) -> None:
    if q_nope.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{OP}: q_nope is {q_nope.dtype}; legal: float16, bfloat16")
    for name, cache, width in (("ckv_cache", ckv_cache, heads.rank), ("kpe_cache", kpe_cache, heads.rope)):
        if cache.dim() != 3 or cache.shape[2] != width:
            raise ValueError(f"{OP}: {name} has shape {shape(cache)}; legal: [pages, page_size, {width}]")
        if cache.dtype not in (q_nope.dtype, FP8) or cache.dtype != ckv_cache.dtype:
            raise TypeError(f"{OP}: {name} is {cache.dtype}; legal: q_nope's {q_nope.dtype} or float8_e4m3fn, for both "
                            "caches")  # fmt: skip
    if heads.rank != 512 or heads.rope != 64 or kv_lora_rank != heads.rank:
        raise ValueError(f"{OP}: R {heads.rank}, Dr {heads.rope}, kv_lora_rank {kv_lora_rank}; legal: 512, 64, 512; "
                         "or call torch_cached_mla_with_cache")  # fmt: skip


def absorbing(heads: LatentHeads, weight, queries: Rows, first: int, tokens: int, like: torch.Tensor) -> Absorbed:
    """For `tokens` of a step after its `first` ones; q_nope's rows are `queries`, all tensors of `like`'s dtype."""
    number, nope, rope, value, rank = heads
    (row, column), block = weight.stride(), (nope + value) * weight.stride(0)
    latents, result = Rows(number * rank, rank), Rows(number * value, value, first)
    to_latent, to_value = Factor(0, block, row, column), Factor(nope * row, block, column, row)
    return Absorbed(
        allocator((tokens, number, rank), like.dtype, like.device),
        head_product(like, tokens, number, nope, rank, queries, to_latent, latents),
        ((tokens, number, rope), (number * rope, rope, 1), first * number * rope),
        head_product(like, tokens, number, rank, value, latents, to_value, result),
    )


def _token_stride(tensor: torch.Tensor) -> int | None:
    """From token to token of [b, s, ..., contiguous]; None where there is no such stride."""
    (b, s), (outer, inner) = tensor.shape[:2], tensor.stride()[:2]
    if tensor.stride(-1) != 1 or (b > 1 and s > 1 and outer != s * inner):
        return None
    return inner if s > 1 else outer


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether FlashInfer's vectors of 16 bytes may begin where these do."""
    return math.gcd(16, *map(torch.Tensor.data_ptr, tensors)) == 16


def readable_copies(q_nope, q_pe, compressed_kv, kpe) -> tuple[torch.Tensor, ...]:
    """Copies of those that cannot be read in place."""

    def copy(tensor):
        return tensor.clone(memory_format=torch.contiguous_format)

    return (
        q_nope if _token_stride(q_nope) is not None else copy(q_nope),
        q_pe if q_pe.is_contiguous() and aligned(q_pe) else copy(q_pe),
        *(each if aligned(each) and (_token_stride(each) or 1) % 8 == 0 else copy(each)
          for each in (compressed_kv, kpe)),
    )  # fmt: skip


def check_caches(ckv_cache: torch.Tensor, kpe_cache: torch.Tensor) -> None:
    """What does not follow from shapes and dtypes."""
    for name, cache in (("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)):
        if not takes_vectors(cache):
            raise ValueError(f"{OP}: {name} has strides {cache.stride()}; legal: last dimension contiguous, rows "
                             "beginning at multiples of 16 bytes")  # fmt: skip
