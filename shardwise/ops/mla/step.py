"""What follows from the layout of the tensors of one FlashInfer MLA step, and copies of those that it cannot read."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shardwise.ops.attention.batch import Batch
from shardwise.ops.attention.checks import shape
from shardwise.ops.attention.flashinfer import FP8
from shardwise.ops.kept import View, fresh
from shardwise.ops.mla.checks import LatentHeads, check_latent
from shardwise.ops.vector_access import takes_vectors

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
    """Tokens whose queries and outputs absorb the weight, by head where a product reads or writes them."""

    absorbed: Callable[[], torch.Tensor]
    """Makes room for the queries' latents [tokens, N, R]"""
    queries: View
    """[N, tokens, Dn]"""
    rotated: View
    """[tokens, N, Dr]"""
    latents: View
    """[N, tokens, R] of a contiguous [tokens, N, R]"""
    out: View
    """[N, tokens, Dv]"""


class MlaPlan(NamedTuple):
    """What follows from the layout of a step's tensors."""

    parameters: Parameters
    tokens: int
    """T, padding included"""
    out: Callable[[], torch.Tensor]
    """Makes room for the result"""
    exact: bool
    """Whether no metadata has entries beyond the batch"""
    readable: bool
    """Whether all are read in place where they are aligned; else copies must be made (`readable_copies`)"""
    latent: View
    """compressed_kv as [tokens, R]"""
    rotated: View
    """kpe as [tokens, Dr]"""
    factors: tuple[View, View]
    """Of the weight, that absorb it into queries, [N, Dn, R], and out of outputs, [N, R, Dv]"""
    prefill: Absorbed
    decode: Absorbed


def plan_step(
    batch: Batch, scale: float | None, kv_lora_rank: int, q_nope, q_pe, compressed_kv, kpe, weight, ckv_cache,
    kpe_cache, indices, positions, indptr, last,
) -> MlaPlan:  # fmt: skip
    """Raises TypeError and ValueError for what does not fit together."""
    heads = check_latent(OP, q_nope, q_pe, compressed_kv, kpe, weight)
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
    (b, s), count = q_nope.shape[:2], batch.tokens
    if count > b * s:
        raise ValueError(f"{OP}: batch_info_host counts {count} tokens, q_nope holds {b * s}")
    check_caches(ckv_cache, kpe_cache)
    strides = [_token_stride(each) for each in (q_nope, compressed_kv, kpe)]
    q_t, latent_t, kpe_t = (stride or 0 for stride in strides)
    (row, column), block = weight.stride(), heads.nope + heads.value

    def absorbed(first: int, tokens: int) -> Absorbed:
        number, nope, rope, value, rank = heads
        return Absorbed(
            fresh((tokens, number, rank), q_nope.dtype, q_nope.device),
            ((number, tokens, nope), (q_nope.stride(2), q_t, 1), first * q_t),
            ((tokens, number, rope), (number * rope, rope, 1), first * number * rope),
            ((number, tokens, rank), (rank, number * rank, 1), 0),
            ((number, tokens, value), (value, number * value, 1), first * number * value),
        )

    return MlaPlan(
        parameters_of(heads, ckv_cache.shape[1], q_nope.dtype, heads.scale(scale)),
        b * s,
        fresh((b, s, heads.count, heads.value), q_nope.dtype, q_nope.device),
        len(indices) == len(positions) == count and len(indptr) == len(last) + 1 == batch.sequences + 1,
        # Rows of FlashInfer's begin at multiples of 16 bytes; queries are read by a product, from anywhere.
        None not in strides and not (latent_t | kpe_t) % 8 and q_pe.is_contiguous(),
        ((count, heads.rank), (latent_t, 1), 0),
        ((count, heads.rope), (kpe_t, 1), 0),
        (
            ((heads.count, heads.nope, heads.rank), (block * row, row, column), 0),
            ((heads.count, heads.rank, heads.value), (block * row, column, row), heads.nope * row),
        ),
        absorbed(0, batch.prefill_tokens),
        absorbed(batch.prefill_tokens, batch.decode),
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
