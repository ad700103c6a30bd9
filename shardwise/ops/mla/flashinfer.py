"""Multi-head latent attention over a paged latent cache by FlashInfer.

Prefill without a cached prefix expands keys and values and runs ragged attention; with one, and in decode, the weight
is absorbed into queries and outputs and the kernel reads the latent pages. Plans are made once a step.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch, read_batch
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
from shardwise.ops.kept import Kept, Tensors, view
from shardwise.ops.mla.reference import fake_cached_mla
from shardwise.ops.mla.step import OP, Absorbed, MlaPlan, Parameters, aligned, check_caches, plan_step, readable_copies
from shardwise.ops.registry import CUDA, FLASHINFER, operator

_PLANS: Kept[MlaPlan] = Kept()


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
    batch = read_batch(OP, batch_info_host)
    key = batch, scale, kv_lora_rank
    given: Tensors = (
        q_nope, q_pe, compressed_kv, kpe, kv_b_proj_weight, ckv_cache, kpe_cache, flashinfer_batch_indices,
        flashinfer_positions, cu_num_pages, last_page_len,
    )  # fmt: skip
    plan = _PLANS.get(key, given) or _PLANS.keep(key, given, plan_step(batch, scale, kv_lora_rank, *given))
    if not plan.readable or not aligned(q_pe, compressed_kv, kpe, ckv_cache, kpe_cache):
        check_caches(ckv_cache, kpe_cache)
        given = (*readable_copies(*given[:4]), *given[4:])
        plan = _PLANS.get(key, given) or _PLANS.keep(key, given, plan_step(batch, scale, kv_lora_rank, *given))
        q_nope, q_pe, compressed_kv, kpe = given[:4]
    out, count = plan.out(), batch.tokens
    if count < plan.tokens:
        out.view(plan.tokens, -1)[count:].zero_()
    if count == 0:
        return out
    latent, rotated = view(compressed_kv, *plan.latent), view(kpe, *plan.rotated)
    indices, positions, indptr, last = given[7:]
    if not plan.exact:
        indices, positions = leading(indices, count), leading(positions, count)
        indptr, last = leading(indptr, batch.sequences + 1), leading(last, batch.sequences)
    quantised = ckv_cache.dtype == FP8
    if quantised:
        if ckv_cache.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{OP}: a CUDA graph cannot hold a step over an fp8 cache; take one of q_nope's dtype")
        latent, rotated = to_fp8(latent, 1.0), to_fp8(rotated, 1.0)
    _append_function()(latent, rotated, indices, positions, ckv_cache, kpe_cache, cache_loc, indptr, last)
    if quantised:
        latent, rotated = latent.to(q_nope.dtype), rotated.to(q_nope.dtype)
        used = cache_loc[: int(cu_num_pages_host[batch.sequences])].long()
        ckv_cache, kpe_cache = (_widened(cache, used, q_nope.dtype) for cache in (ckv_cache, kpe_cache))
        cache_loc = torch.arange(len(used), dtype=torch.int32, device=used.device)
    owner, split = planner("mla", ckv_cache.device), batch.prefill_tokens
    host = (cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host)
    tensors = q_nope, q_pe, kv_b_proj_weight, ckv_cache, kpe_cache, out
    if split and _has_prefix(batch, cu_seqlen_host, seq_len_with_cache_host):
        _run_absorbed(
            plan, plan.prefill, _prefix_wrapper(owner, plan.parameters, batch, cu_seqlen_host, host), *tensors
        )
    elif split:
        wrapper = _ragged_wrapper(owner, plan.parameters, batch, cu_seqlen_host)
        _run_ragged(plan, wrapper, q_nope, q_pe, kv_b_proj_weight, latent[:split], rotated[:split], out)
    if batch.decode:
        wrapper = _decode_wrapper(owner, plan.parameters, batch, ckv_cache.shape[0], host)
        _run_absorbed(plan, plan.decode, wrapper, *tensors)
    return out


@functools.cache
def _append_function():
    from flashinfer.page import append_paged_mla_kv_cache

    return append_paged_mla_kv_cache


def _widened(cache: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The given pages of an fp8 cache, one behind the other, in `dtype`."""
    return cache.view(torch.uint8)[pages].view(FP8).to(dtype)


def _has_prefix(batch: Batch, cu_seqlen_host: Tensor, seq_len_with_cache_host: Tensor) -> bool:
    """Whether any prefill sequence continues in the cache."""
    lengths = cu_seqlen_host[: batch.prefill + 1].diff()
    return bool((seq_len_with_cache_host[: batch.prefill] > lengths).any())


def _prefix_wrapper(owner: Planner, parameters: Parameters, batch: Batch, cu_seqlen_host: Tensor, host) -> Any:
    def plan(wrapper):
        starts = cu_seqlen_host[: batch.prefill + 1]
        _plan_absorbed(parameters, True, wrapper, starts, select_pages(0, batch.prefill, *host))

    return owner.planned(("prefix", parameters), lambda: _create_absorbed(owner, None), plan)


def _ragged_wrapper(owner: Planner, parameters: Parameters, batch: Batch, cu_seqlen_host: Tensor) -> Any:
    indptr = cu_seqlen_host[: batch.prefill + 1]
    return owner.planned(
        ("ragged", parameters), lambda: _create_ragged(owner), lambda w: _plan_ragged(parameters, w, indptr)
    )


def _decode_wrapper(owner: Planner, parameters: Parameters, batch: Batch, pages: int, host) -> Any:
    return owner.current(owner.decode_key(parameters, batch.decode, pages)) or owner.planned_decode(
        parameters,
        lambda: select_pages(batch.prefill, batch.sequences, *host),
        batch.decode,
        pages,
        DecodeFamily(_create_absorbed, functools.partial(_plan_decode, parameters)),
    )


def _run_absorbed(plan: MlaPlan, part: Absorbed, wrapper, q_nope, q_pe, weight, ckv_cache, kpe_cache, out) -> None:
    """Tokens whose queries and outputs have absorbed the weight; no copy is made before or after the products."""
    absorbed, (to_latent, to_value) = part.absorbed(), plan.factors
    torch.bmm(view(q_nope, *part.queries), view(weight, *to_latent), out=view(absorbed, *part.latents))
    mixed = wrapper.run(absorbed, view(q_pe, *part.rotated), ckv_cache, kpe_cache)
    torch.bmm(view(mixed, *part.latents), view(weight, *to_value), out=view(out, *part.out))


def _run_ragged(plan: MlaPlan, wrapper, q_nope, q_pe, weight, latent: Tensor, rotated: Tensor, out: Tensor) -> None:
    """The prefill tokens, whose keys and values are expanded."""
    heads, tokens = plan.parameters.heads, latent.shape[0]
    both = (latent @ weight.t()).view(-1, heads.count, heads.nope + heads.value)
    key = torch.cat((both[..., : heads.nope], rotated[:, None].expand(-1, heads.count, -1)), dim=-1)
    queries = view(q_nope, *plan.prefill.queries).transpose(0, 1), view(q_pe, *plan.prefill.rotated)
    rows = out.view(-1, heads.count, heads.value)[:tokens]
    wrapper.run(torch.cat(queries, dim=-1), key, both[..., heads.nope :].contiguous(), out=rows)
