"""Multi-head latent attention over a paged latent cache by FlashInfer.

Prefill without a cached prefix expands keys and values and runs ragged attention; with one, and in decode, the weight
is absorbed into queries and outputs and the kernel reads the latent pages. Plans are made once a step.
"""

import functools

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.attention.flashinfer import to_fp8
from shardwise.ops.attention.flashinfer_step import FP8
from shardwise.ops.attention.planner import (
    DecodeFamily,
    Pages,
    Planner,
    prefill_starts,
    select_pages,
    without_padding,
)
from shardwise.ops.attention.positions import fake_token_positions, token_positions
from shardwise.ops.mla.expand import expand
from shardwise.ops.mla.reference import fake_cached_mla
from shardwise.ops.mla.step import OP, Absorbed, MlaPlan, Parameters, aligned, check_caches, plan_step, readable_copies
from shardwise.ops.registry import CUDA, FLASHINFER, TRITON, operator
from shardwise.plan_cache import PlanCache, Tensors, view

_PLANS: PlanCache[MlaPlan] = PlanCache()


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


def _create_absorbed(owner: Planner, buffers):
    from flashinfer.mla import BatchMLAPagedAttentionWrapper as Wrapper

    if buffers is None:
        return Wrapper(owner.workspace)
    return Wrapper(
        owner.workspace, use_cuda_graph=True, qo_indptr=buffers.qo_indptr, kv_indptr=buffers.indptr,
        kv_indices=buffers.indices, kv_len_arr=buffers.last_page_len,
    )  # fmt: skip


def _plan_absorbed(parameters: Parameters, causal: bool, wrapper, qo_indptr: torch.Tensor, pages: Pages) -> None:
    heads = parameters.heads
    wrapper.plan(
        qo_indptr, pages.indptr, pages.indices, pages.lengths, heads.count, heads.rank, heads.rope,
        parameters.page_size, causal, parameters.scale, parameters.dtype, parameters.dtype,
    )  # fmt: skip


def _plan_decode(parameters: Parameters, wrapper, pages: Pages) -> None:
    # One query sees every key up to its own, so no mask is needed.
    _plan_absorbed(parameters, False, wrapper, torch.arange(pages.sequences + 1, dtype=torch.int32), pages)


_DECODE = DecodeFamily(_create_absorbed, _plan_decode)


def _create_ragged(owner: Planner):
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper as Wrapper

    return Wrapper(owner.workspace, "NHD", backend="fa2")


def _plan_ragged(parameters: Parameters, wrapper, indptr: torch.Tensor) -> None:
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
    needs=(CUDA, FLASHINFER, TRITON),
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
    batch = read_batch(OP, batch_info_host)
    plan, given = _plan_of(
        (batch, scale, kv_lora_rank),
        (q_nope, q_pe, compressed_kv, kpe, kv_b_proj_weight, ckv_cache, kpe_cache, flashinfer_batch_indices,
         flashinfer_positions, cu_num_pages, last_page_len),
    )  # fmt: skip
    out = plan.out()
    if not plan.full:
        out.view(plan.tokens, -1)[batch.tokens :].zero_()
        if batch.tokens == 0:
            return out
    latent, rotated = view(given[2], *plan.latent), view(given[3], *plan.rotated)
    metadata = given[7:] if plan.exact else without_padding(batch, *given[7:])
    caches, host = (ckv_cache, kpe_cache), (cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host)
    if plan.quantised:
        latent, rotated, caches, host = _append_quantised(plan, batch, latent, rotated, metadata, caches, host)
    else:
        _append(latent, rotated, metadata, caches, cache_loc)
    tensors = given[0], given[1], kv_b_proj_weight, *caches, out
    if batch.prefill_tokens:
        _run_prefill(plan, batch, cu_seqlen_host, host, latent, rotated, tensors)
    if batch.decode:
        wrapper = plan.owner.decode_wrapper(_DECODE, plan.parameters, batch, caches[0].shape[0], host)
        _run_absorbed(plan.decode, wrapper, tensors)
    return out


def _plan_of(key: tuple, given: Tensors) -> tuple[MlaPlan, Tensors]:
    """The plan of a step; q_nope, q_pe, compressed_kv and kpe are copies where they cannot be read in place."""
    plan = _PLANS.get(key, given) or _PLANS.keep(key, given, plan_step(*key, *given))
    _, q_pe, compressed_kv, kpe, _, ckv_cache, kpe_cache, *_ = given
    if plan.readable and aligned(q_pe, compressed_kv, kpe, ckv_cache, kpe_cache):
        return plan, given
    check_caches(ckv_cache, kpe_cache)
    given = (*readable_copies(*given[:4]), *given[4:])
    return _PLANS.get(key, given) or _PLANS.keep(key, given, plan_step(*key, *given)), given


def _append(latent: Tensor, rotated: Tensor, metadata: Tensors, caches: Tensors, cache_loc: Tensor) -> None:
    indices, positions, indptr, last = metadata
    _append_function()(latent, rotated, indices, positions, *caches, cache_loc.contiguous(), indptr, last)


@functools.cache
def _append_function():
    from flashinfer.page import append_paged_mla_kv_cache

    return append_paged_mla_kv_cache


def _append_quantised(plan: MlaPlan, batch: Batch, latent: Tensor, rotated: Tensor, metadata, caches, host):
    """Append to fp8 caches; returns as attention reads them latents, rotated keys, and all pages used, now in order."""
    cu_num_pages_host, cache_loc, *lengths = host
    if caches[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{OP}: a CUDA graph cannot hold a step over an fp8 cache; take one of q_nope's dtype")
    latent, rotated = to_fp8(latent, 1.0), to_fp8(rotated, 1.0)
    _append(latent, rotated, metadata, caches, cache_loc)
    used, dtype = cache_loc[: int(cu_num_pages_host[batch.sequences])].long(), plan.parameters.dtype
    widened = tuple(cache.view(torch.uint8)[used].view(FP8).to(dtype) for cache in caches)
    order = torch.arange(len(used), dtype=torch.int32, device=used.device)
    return latent.to(dtype), rotated.to(dtype), widened, (cu_num_pages_host, order, *lengths)


def _run_prefill(
    plan: MlaPlan, batch: Batch, cu_seqlen_host: Tensor, host, latent: Tensor, rotated: Tensor, tensors: Tensors
) -> None:  # fmt: skip
    owner, parameters, split = plan.owner, plan.parameters, batch.prefill_tokens
    key = "ragged", parameters
    wrapper = owner.current(key)
    if wrapper is None:

        def starts():
            return prefill_starts(OP, batch, cu_seqlen_host)

        if sum(host[3][: batch.prefill].tolist()) > split:  # a sequence continues in the cache
            wrapper = owner.planned(
                ("prefix", parameters),
                lambda: _create_absorbed(owner, None),
                lambda w: _plan_absorbed(parameters, True, w, starts(), select_pages(0, batch.prefill, *host)),
            )
            _run_absorbed(plan.prefill, wrapper, tensors)
            return
        wrapper = owner.planned(key, lambda: _create_ragged(owner), lambda w: _plan_ragged(parameters, w, starts()))
    if batch.decode:
        latent, rotated = latent[:split], rotated[:split]
    _run_ragged(plan, wrapper, latent, rotated, tensors)


def _run_absorbed(part: Absorbed, wrapper, tensors: Tensors) -> None:
    """Tokens whose queries and outputs absorb the weight."""
    q_nope, q_pe, weight, ckv_cache, kpe_cache, out = tensors
    latents = part.latents()
    part.absorb(q_nope, weight, latents)
    mixed = wrapper.run(latents, view(q_pe, *part.rotated), ckv_cache, kpe_cache)
    part.release(mixed, weight, out)


def _run_ragged(plan: MlaPlan, wrapper, latent: Tensor, rotated: Tensor, tensors: Tensors) -> None:
    """The prefill tokens, whose keys and values are expanded."""
    q_nope, q_pe, weight, _, _, out = tensors
    queries, keys, values = expand(plan.expanded, latent, rotated, q_nope, q_pe, weight)
    wrapper.run(queries, keys, values, out=view(out, *plan.prompts), enable_pdl=plan.pdl)
