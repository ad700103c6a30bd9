"""Multi-head latent attention over a paged latent cache by FlashInfer.

Prefill without a cached prefix expands keys and values and runs ragged attention; with one, and in decode, the weight
is absorbed into queries and outputs and the kernel reads the latent pages. Plans are made once a step.
"""

import functools
from typing import NamedTuple

import torch

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.attention.checks import shape
from shardwise.ops.attention.flashinfer import FP8, to_fp8
from shardwise.ops.attention.planner import (
    DecodeFamily,
    Pages,
    Planner,
    leading,
    planner,
    select_pages,
)
from shardwise.ops.attention.positions import fake_token_positions, token_positions
from shardwise.ops.mla.checks import LatentHeads, absorbing_views, check_latent
from shardwise.ops.mla.reference import fake_cached_mla
from shardwise.ops.registry import CUDA, FLASHINFER, operator
from shardwise.ops.vector_access import takes_vectors, with_vectors

OP = "flashinfer_mla_with_cache"


@operator(fake=fake_token_positions)
def flashinfer_mla_prepare_metadata(
    position_ids: torch.Tensor,
    batch_info_host: torch.Tensor,
    cu_seqlen: torch.Tensor,
    seq_len_with_cache: torch.Tensor,
) -> list[torch.Tensor]:
    """The sequence of every flat token and its absolute position, both int32 [b * s] (-1 for padding tokens).

    As `flashinfer_attention_prepare_metadata`, for the plans of `flashinfer_mla_with_cache`. Runs anywhere.
    """
    op = "flashinfer_mla_prepare_metadata"
    return token_positions(op, "mla", read_batch(op, batch_info_host), position_ids, cu_seqlen, seq_len_with_cache)


class _Parameters(NamedTuple):
    """What a plan depends on besides the batch."""

    heads: LatentHeads
    page_size: int
    dtype: torch.dtype
    scale: float


def _create_absorbed(owner: Planner, buffers):
    from flashinfer.mla import BatchMLAPagedAttentionWrapper as Wrapper

    if buffers is None:
        return Wrapper(owner.workspace)
    return Wrapper(
        owner.workspace, use_cuda_graph=True, qo_indptr=buffers.qo_indptr, kv_indptr=buffers.indptr,
        kv_indices=buffers.indices, kv_len_arr=buffers.last_page_len,
    )  # fmt: skip


def _plan_absorbed(parameters: _Parameters, causal: bool, wrapper, qo_indptr: torch.Tensor, pages: Pages) -> None:
    heads = parameters.heads
    wrapper.plan(
        qo_indptr, pages.indptr, pages.indices, pages.lengths, heads.count, heads.rank, heads.rope,
        parameters.page_size, causal, parameters.scale, parameters.dtype, parameters.dtype,
    )  # fmt: skip


def _plan_decode(parameters: _Parameters, wrapper, pages: Pages) -> None:
    # One query sees every key up to its own, so no mask is needed.
    _plan_absorbed(parameters, False, wrapper, torch.arange(pages.sequences + 1, dtype=torch.int32), pages)


def _create_ragged(owner: Planner):
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper as Wrapper

    return Wrapper(owner.workspace, "NHD", backend="fa2")


def _plan_ragged(parameters: _Parameters, wrapper, indptr: torch.Tensor) -> None:
    heads = parameters.heads
    wrapper.plan(
        indptr, indptr, heads.count, heads.count, heads.nope + heads.rope, head_dim_vo=heads.value, causal=True,
        use_fp16_qk_reduction=False, sm_scale=parameters.scale, q_data_type=parameters.dtype,
    )  # fmt: skip


def _fake(
    q_nope,
    q_pe,
    compressed_kv,
    kpe,
    kv_b_proj_weight,
    batch_info_host,
    cu_seqlen_host,
    cu_num_pages,
    cu_num_pages_host,
    cache_loc,
    last_page_len,
    last_page_len_host,
    seq_len_with_cache_host,
    flashinfer_batch_indices,
    flashinfer_positions,
    ckv_cache,
    kpe_cache,
    scale,
    kv_lora_rank,
):
    return fake_cached_mla(q_nope, kv_b_proj_weight)


@operator(
    fake=_fake,
    mutates=("ckv_cache", "kpe_cache"),
    needs=(CUDA, FLASHINFER),
    instead="torch_cached_mla_with_cache",
)
def flashinfer_mla_with_cache(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    compressed_kv: torch.Tensor,
    kpe: torch.Tensor,
    kv_b_proj_weight: torch.Tensor,
    batch_info_host: torch.Tensor,
    cu_seqlen_host: torch.Tensor,
    cu_num_pages: torch.Tensor,
    cu_num_pages_host: torch.Tensor,
    cache_loc: torch.Tensor,
    last_page_len: torch.Tensor,
    last_page_len_host: torch.Tensor,
    seq_len_with_cache_host: torch.Tensor,
    flashinfer_batch_indices: torch.Tensor,
    flashinfer_positions: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    scale: float | None,
    kv_lora_rank: int,
) -> torch.Tensor:
    """Append latents to a paged cache and attend to it, causally.

    q_nope [b, s, N, Dn], q_pe [b, s, N, Dr], compressed_kv [b, s, R], kpe [b, s, 1, Dr], kv_b_proj_weight
    [N * (Dn + Dv), R], float16 or bfloat16; ckv_cache [pages, page_size, R], kpe_cache [pages, page_size, Dr], both of
    q's dtype or both float8_e4m3fn. FlashInfer's kernels fix R = 512 and Dr = 64 and read no fp8: the pages of an fp8
    cache that the step uses are widened first, which needs memory for them and cannot be captured in a graph. Page
    metadata as in `flashinfer_attention_mha_with_cache`; batch indices and positions come from
    `flashinfer_mla_prepare_metadata`, called once a step. Returns [b, s, N, Dv], 0 for padding tokens.
    """
    call = _checked(
        (q_nope.shape, q_pe.shape, compressed_kv.shape, kpe.shape, kv_b_proj_weight.shape, ckv_cache.shape,
         kpe_cache.shape),
        (q_nope.dtype, q_pe.dtype, compressed_kv.dtype, kpe.dtype, kv_b_proj_weight.dtype, ckv_cache.dtype,
         kpe_cache.dtype),
        scale, kv_lora_rank,
    )  # fmt: skip
    batch, heads = read_batch(OP, batch_info_host), call.parameters.heads
    _check_caches(ckv_cache, kpe_cache)
    if batch.tokens > call.tokens:
        raise ValueError(f"{OP}: batch_info_host counts {batch.tokens} tokens, q_nope holds {call.tokens}")
    q_nope, q_pe = q_nope.flatten(0, 1), q_pe.flatten(0, 1)
    latent, kpe = leading(compressed_kv.flatten(0, 1), batch.tokens), leading(kpe.flatten(0, 2), batch.tokens)
    out = q_nope.new_empty(*call.out_shape)
    rows = out.view(call.tokens, heads.count, heads.value)
    if batch.tokens < call.tokens:
        rows[batch.tokens :].zero_()
    if batch.tokens == 0:
        return out
    if ckv_cache.dtype == FP8:
        latent, kpe = to_fp8(latent, 1.0), to_fp8(kpe, 1.0)
    _append_function()(
        with_vectors(latent), with_vectors(kpe), leading(flashinfer_batch_indices, batch.tokens),
        leading(flashinfer_positions, batch.tokens), ckv_cache, kpe_cache, cache_loc,
        leading(cu_num_pages, batch.sequences + 1), leading(last_page_len, batch.sequences),
    )  # fmt: skip
    if ckv_cache.dtype == FP8:
        latent, kpe = latent.to(q_nope.dtype), kpe.to(q_nope.dtype)
        used = cache_loc[: int(cu_num_pages_host[batch.sequences])].long()
        ckv_cache, kpe_cache = (_widened(cache, used, q_nope.dtype) for cache in (ckv_cache, kpe_cache))
        cache_loc = torch.arange(len(used), dtype=torch.int32, device=used.device)
    step = _Step(
        batch, call.parameters, kv_b_proj_weight, ckv_cache, kpe_cache, cu_seqlen_host,
        (cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host),
    )  # fmt: skip
    split = batch.prefill_tokens
    if split and step.has_prefix():
        step.run_absorbed(step.prefill_wrapper(), q_nope[:split], q_pe[:split], rows[:split])
    elif split:
        step.run_ragged(q_nope[:split], q_pe[:split], latent[:split], kpe[:split], rows[:split])
    if batch.decode:
        if batch.decode < call.tokens:
            q_nope, q_pe, rows = (each[split : batch.tokens] for each in (q_nope, q_pe, rows))
        step.run_absorbed(step.decode_wrapper(), q_nope, q_pe, rows)
    return out


@functools.cache
def _append_function():
    from flashinfer.page import append_paged_mla_kv_cache

    return append_paged_mla_kv_cache


def _widened(cache: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The given pages of an fp8 cache, one behind the other, in `dtype`."""
    return cache.view(torch.uint8)[pages].view(FP8).to(dtype)


class _Step(NamedTuple):
    """One call's tensors and host metadata."""

    batch: Batch
    parameters: _Parameters
    weight: torch.Tensor
    ckv_cache: torch.Tensor
    kpe_cache: torch.Tensor
    cu_seqlen_host: torch.Tensor
    pages: tuple[torch.Tensor, ...]

    @property
    def owner(self) -> Planner:
        return planner("mla", self.ckv_cache.device)

    def has_prefix(self) -> bool:
        """Whether any prefill sequence continues in the cache."""
        starts = self.cu_seqlen_host[: self.batch.prefill + 1]
        return bool((self.pages[3][: self.batch.prefill] > starts.diff()).any())

    def prefill_wrapper(self):
        count, parameters = self.batch.prefill, self.parameters

        def plan(wrapper):
            starts = self.cu_seqlen_host[: count + 1]
            _plan_absorbed(parameters, True, wrapper, starts, select_pages(0, count, *self.pages))

        return self.owner.planned(("prefix", parameters), lambda: _create_absorbed(self.owner, None), plan)

    def decode_wrapper(self):
        owner, count, pages = self.owner, self.batch.decode, self.ckv_cache.shape[0]
        return owner.current(owner.decode_key(self.parameters, count, pages)) or owner.planned_decode(
            self.parameters,
            lambda: select_pages(self.batch.prefill, self.batch.sequences, *self.pages),
            count,
            pages,
            DecodeFamily(_create_absorbed, functools.partial(_plan_decode, self.parameters)),
        )

    def run_absorbed(self, wrapper, q_nope, q_pe, out) -> None:
        heads = self.parameters.heads
        w_key, w_value = absorbing_views(self.weight, heads)
        absorbed = q_nope.new_empty(q_nope.shape[0], heads.count, heads.rank)
        # Products by head, written where the next step wants them, by token: no copy follows.
        torch.bmm(q_nope.transpose(0, 1), w_key, out=absorbed.transpose(0, 1))
        mixed = wrapper.run(absorbed, with_vectors(q_pe.contiguous()), self.ckv_cache, self.kpe_cache)
        torch.bmm(mixed.transpose(0, 1), w_value, out=out.transpose(0, 1))

    def run_ragged(self, q_nope, q_pe, latent, kpe, out) -> None:
        heads, parameters = self.parameters.heads, self.parameters
        indptr = self.cu_seqlen_host[: self.batch.prefill + 1]
        wrapper = self.owner.planned(
            ("ragged", parameters), lambda: _create_ragged(self.owner), lambda w: _plan_ragged(parameters, w, indptr)
        )
        both = (latent @ self.weight.t()).view(-1, heads.count, heads.nope + heads.value)
        key = torch.cat((both[..., : heads.nope], kpe[:, None].expand(-1, heads.count, -1)), dim=-1)
        query = torch.cat((q_nope, q_pe), dim=-1)
        wrapper.run(query, key, both[..., heads.nope :].contiguous(), out=out)


class _Call(NamedTuple):
    """What follows from shapes and dtypes alone."""

    parameters: _Parameters
    tokens: int
    out_shape: tuple[int, int, int, int]


@functools.lru_cache(maxsize=4096)
def _checked(
    shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype, ...], scale: float | None, kv_lora_rank: int
) -> _Call:
    """From the shapes and dtypes of the queries, latents, weight and caches, in the operator's order."""
    q_nope, q_pe, compressed_kv, kpe, weight, ckv_cache, kpe_cache = (
        torch.empty(s, dtype=dtype, device="meta") for s, dtype in zip(shapes, dtypes, strict=True)
    )
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
    b, s = q_nope.shape[:2]
    parameters = _Parameters(heads, ckv_cache.shape[1], q_nope.dtype, heads.scale(scale))
    return _Call(parameters, b * s, (b, s, heads.count, heads.value))


def _check_caches(ckv_cache: torch.Tensor, kpe_cache: torch.Tensor) -> None:
    """What does not follow from shapes and dtypes."""
    for name, cache in (("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)):
        if not takes_vectors(cache):
            raise ValueError(f"{OP}: {name} has strides {cache.stride()}; legal: last dimension contiguous, rows "
                             "beginning at multiples of 16 bytes")  # fmt: skip
    if ckv_cache.dtype == FP8 and ckv_cache.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{OP}: a CUDA graph cannot hold a step over an fp8 cache; take one of q_nope's dtype")
