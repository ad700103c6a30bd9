"""Multi-head latent attention over a paged latent cache by FlashInfer.

Prefill without a cached prefix expands keys and values and runs ragged attention; with one, and in decode, the weight
is absorbed into queries and outputs and the kernel reads the latent pages. Plans are made once a step.
"""

import functools
from typing import NamedTuple

import torch

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
    step = _Step(
        batch, plan, q_nope, q_pe, kv_b_proj_weight, ckv_cache, kpe_cache, out, cu_seqlen_host,
        (cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host),
    )  # fmt: skip
    split = batch.prefill_tokens
    if split and step.has_prefix():
        step.run_absorbed(step.prefill_wrapper(), plan.prefill)
    elif split:
        step.run_ragged(latent[:split], rotated[:split])
    if batch.decode:
        step.run_absorbed(step.decode_wrapper(), plan.decode)
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
    plan: MlaPlan
    q_nope: torch.Tensor
    q_pe: torch.Tensor
    weight: torch.Tensor
    ckv_cache: torch.Tensor
    kpe_cache: torch.Tensor
    out: torch.Tensor
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
        count, parameters = self.batch.prefill, self.plan.parameters

        def plan(wrapper):
            starts = self.cu_seqlen_host[: count + 1]
            _plan_absorbed(parameters, True, wrapper, starts, select_pages(0, count, *self.pages))

        return self.owner.planned(("prefix", parameters), lambda: _create_absorbed(self.owner, None), plan)

    def decode_wrapper(self):
        owner, count, pages, parameters = self.owner, self.batch.decode, self.ckv_cache.shape[0], self.plan.parameters
        return owner.current(owner.decode_key(parameters, count, pages)) or owner.planned_decode(
            parameters,
            lambda: select_pages(self.batch.prefill, self.batch.sequences, *self.pages),
            count,
            pages,
            DecodeFamily(_create_absorbed, functools.partial(_plan_decode, parameters)),
        )

    def run_absorbed(self, wrapper, part: Absorbed) -> None:
        absorbed, (to_latent, to_value) = part.absorbed(), self.plan.factors
        # No copy is made before or after the products.
        torch.bmm(view(self.q_nope, *part.queries), view(self.weight, *to_latent), out=view(absorbed, *part.latents))
        mixed = wrapper.run(absorbed, view(self.q_pe, *part.rotated), self.ckv_cache, self.kpe_cache)
        torch.bmm(view(mixed, *part.latents), view(self.weight, *to_value), out=view(self.out, *part.out))

    def run_ragged(self, latent: torch.Tensor, rotated: torch.Tensor) -> None:
        """The prefill tokens, whose keys and values are expanded."""
        parameters, tokens = self.plan.parameters, self.batch.prefill_tokens
        heads, indptr = parameters.heads, self.cu_seqlen_host[: self.batch.prefill + 1]
        wrapper = self.owner.planned(
            ("ragged", parameters), lambda: _create_ragged(self.owner), lambda w: _plan_ragged(parameters, w, indptr)
        )
        both = (latent @ self.weight.t()).view(-1, heads.count, heads.nope + heads.value)
        key = torch.cat((both[..., : heads.nope], rotated[:, None].expand(-1, heads.count, -1)), dim=-1)
        q_nope = view(self.q_nope, *self.plan.prefill.queries).transpose(0, 1)
        query = torch.cat((q_nope, self.q_pe.view(-1, heads.count, heads.rope)[:tokens]), dim=-1)
        out = self.out.view(-1, heads.count, heads.value)[:tokens]
        wrapper.run(query, key, both[..., heads.nope :].contiguous(), out=out)
