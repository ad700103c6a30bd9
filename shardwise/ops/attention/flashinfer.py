"""Attention over a paged cache by FlashInfer: plans made once a step (`planner.py`), reused by every layer."""

import functools
from typing import Any

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.attention.flashinfer_step import FP8, OP, AttentionPlan, Parameters, Sizes, plan_step
from shardwise.ops.attention.planner import (
    DecodeFamily,
    Pages,
    PagesHost,
    Planner,
    prefill_starts,
    select_pages,
    without_padding,
)
from shardwise.ops.attention.positions import fake_token_positions, token_positions
from shardwise.ops.registry import CUDA, FLASHINFER, operator
from shardwise.ops.vector_access import takes_vectors, with_vectors
from shardwise.plan_cache import PlanCache, view


@operator(fake=fake_token_positions)
def flashinfer_attention_prepare_metadata(
    position_ids: torch.Tensor,
    batch_info_host: torch.Tensor,
    cu_seqlen: torch.Tensor,
    seq_len_with_cache: torch.Tensor,
) -> list[torch.Tensor]:
    """The sequence of every flat token and its absolute position, both int32 [b * s] (-1 for padding tokens).

    position_ids [b, s] gives the number of tokens, cu_seqlen [B + 1] and seq_len_with_cache [B] the sequences.
    Starts a new step: plans of `flashinfer_attention_mha_with_cache` become stale. One kernel on a GPU, where bad
    bounds are reported (`metadata_reports.py`); plain PyTorch elsewhere.
    """
    op = "flashinfer_attention_prepare_metadata"
    batch = read_batch(op, batch_info_host)
    return token_positions(op, "attention", batch, position_ids, cu_seqlen, seq_len_with_cache)


_PLANS: PlanCache[AttentionPlan] = PlanCache()


@functools.cache
def _backend(device: torch.device) -> str:
    """FlashInfer's FA2 kernels on Hopper: its FA3 kernels take no fp8 cache with 16-bit queries."""
    return "fa2" if torch.cuda.get_device_capability(device)[0] == 9 else "auto"


def _create_decode(owner: Planner, buffers):
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper as Wrapper

    options = {} if buffers is None else {
        "use_cuda_graph": True,
        "paged_kv_indptr_buffer": buffers.indptr,
        "paged_kv_indices_buffer": buffers.indices,
        "paged_kv_last_page_len_buffer": buffers.last_page_len,
    }  # fmt: skip
    return Wrapper(owner.workspace, "HND", use_tensor_cores=True, backend=_backend(owner.device), **options)


def _plan_decode(parameters: Parameters, wrapper, pages: Pages) -> None:
    wrapper.plan(
        pages.indptr, pages.indices, pages.last_page_len, head_dim=parameters.heads.size, seq_lens=pages.lengths,
        **parameters.plan_arguments(),
    )  # fmt: skip


_DECODE = DecodeFamily(_create_decode, _plan_decode)


def _create_prefill(owner: Planner):
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Wrapper

    return Wrapper(owner.workspace, "HND", backend=_backend(owner.device))


def _plan_prefill(parameters: Parameters, wrapper, qo_indptr: torch.Tensor, pages: Pages) -> None:
    wrapper.plan(
        qo_indptr, pages.indptr, pages.indices, pages.last_page_len, head_dim_qk=parameters.heads.size, causal=True,
        seq_lens=pages.lengths, **parameters.plan_arguments(),
    )  # fmt: skip


def _fake(
    q,
    k,
    v,
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
    kv_cache,
    scale,
    k_scale,
    v_scale,
):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@operator(
    fake=_fake, mutates=("kv_cache",), needs=(CUDA, FLASHINFER), instead="triton_attention_flattened_mha_with_cache"
)
def flashinfer_attention_mha_with_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    kv_cache: torch.Tensor,
    scale: float | None,
    k_scale: float,
    v_scale: float,
) -> torch.Tensor:
    """Append k and v to a paged cache and attend to it, causally.

    q [b, s, N, D] or [b, s, N*D], k and v likewise with Nkv heads, float16 or bfloat16; kv_cache [pages, 2, Nkv,
    page_size, D] holds keys in [:, 0] and values in [:, 1]. With a float8_e4m3fn cache it holds k / k_scale and
    v / v_scale, saturated; for other caches the scales do not count. Pages of all sequences are concatenated
    in cache_loc; the *_host tensors are on the CPU, int32. flashinfer_batch_indices and flashinfer_positions come
    from `flashinfer_attention_prepare_metadata`, which must be called once a step. Returns a tensor like q,
    contiguous, 0 for padding tokens.
    """
    batch = read_batch(OP, batch_info_host)
    key, metadata = (batch, scale), (flashinfer_batch_indices, flashinfer_positions, cu_num_pages, last_page_len)
    given = q, k, v, kv_cache, *metadata
    plan = _PLANS.get(key, given) or _PLANS.keep(key, given, plan_step(batch, scale, *given))
    if plan.dense and not (q.data_ptr() | k.data_ptr() | v.data_ptr() | kv_cache.data_ptr()) % 16:
        q_rows = view(q, plan.q_sizes, plan.q_strides)
        k_rows, v_rows = view(k, plan.k_sizes, plan.k_strides), view(v, plan.k_sizes, plan.k_strides)
    else:
        q_rows, k_rows, v_rows = _readable(plan, q, k, v, kv_cache)
    out = plan.out()
    if not plan.full:
        out.view(plan.tokens, -1)[plan.used :].zero_()
        if plan.used == 0:
            return out
    # Keys and values are separated here, once: FlashInfer takes both, and would do it in each of its calls.
    sizes, strides = plan.half_sizes, plan.half_strides
    caches = view(kv_cache, sizes, strides), view(kv_cache, sizes, strides, plan.values)
    indices, positions, indptr, last = metadata if plan.exact else without_padding(batch, *metadata)
    if plan.quantised:
        k_rows, v_rows = to_fp8(k_rows, k_scale), to_fp8(v_rows, v_scale)
    else:
        k_scale = v_scale = 1.0
    pages = cache_loc.contiguous()
    _append_function()(k_rows, v_rows, indices, positions, caches, pages, indptr, last, kv_layout="HND")
    host = (cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host)
    rows = view(out, plan.q_sizes, plan.q_strides)
    _attend(plan, batch, cu_seqlen_host, host, q_rows, caches, rows, k_scale, v_scale)
    return out


def _attend(
    plan: AttentionPlan, batch: Batch, cu_seqlen_host: Tensor, host: PagesHost, q: Tensor,
    caches: tuple[Tensor, Tensor], out: Tensor, k_scale: float, v_scale: float,
) -> None:  # fmt: skip
    """Attention of the batch's queries [count, N, D] into `out`; FlashInfer multiplies v_scale in, in place."""
    parameters, split, owner = plan.parameters, batch.prefill_tokens, plan.owner
    if split:
        key = "prefill", parameters
        wrapper = owner.current(key) or _planned_prefill(owner, key, batch, cu_seqlen_host, host)
        part, result = (q[:split], out[:split]) if batch.decode else (q, out)
        wrapper.run(part, caches, k_scale=k_scale, v_scale=v_scale, out=result, enable_pdl=plan.pdl)
    if batch.decode:
        wrapper = owner.decode_wrapper(_DECODE, parameters, batch, plan.pages, host)
        part, result = (q[split:], out[split:]) if split else (q, out)
        wrapper.run(part, caches, k_scale=k_scale, v_scale=v_scale, out=result, enable_pdl=plan.pdl)


def _planned_prefill(owner: Planner, key: tuple, batch: Batch, cu_seqlen_host: Tensor, host: PagesHost) -> Any:
    def plan(wrapper):
        starts = prefill_starts(OP, batch, cu_seqlen_host)
        _plan_prefill(key[1], wrapper, starts, select_pages(0, batch.prefill, *host))

    return owner.planned(key, lambda: _create_prefill(owner), plan)


@functools.cache
def _append_function():
    from flashinfer.page import append_paged_kv_cache

    return append_paged_kv_cache


def to_fp8(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """tensor / scale in float8_e4m3fn, saturated."""
    if scale != 1.0:
        tensor = tensor.float() / scale
    return tensor.clamp(-448.0, 448.0).to(FP8)  # a plain cast turns an overflow into NaN


def _readable(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as [count, heads, D], where FlashInfer's vectors of 16 bytes may read; copies where they may not."""
    if not takes_vectors(kv_cache):
        raise ValueError(f"{OP}: kv_cache has strides {kv_cache.stride()}; legal: last dimension contiguous, rows of D "
                         "beginning at multiples of 16 bytes")  # fmt: skip
    k_rows, v_rows = _flat(k, plan.tokens, plan.k_sizes), _flat(v, plan.tokens, plan.k_sizes)
    return _flat(q, plan.tokens, plan.q_sizes), k_rows, v_rows


def _flat(tensor: Tensor, tokens: int, sizes: Sizes) -> Tensor:
    count, heads, size = sizes
    flat = tensor.reshape(tokens, heads, size)[:count]
    if flat.stride(1) != size:
        flat = flat.contiguous()
    return with_vectors(flat)
