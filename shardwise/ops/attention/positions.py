"""Sequence and position of every token of a paged step, which FlashInfer needs besides the page table."""

from collections.abc import Callable

import torch

from shardwise.ops.attention.batch import Batch
from shardwise.ops.attention.planner import planner
from shardwise.ops.devices import require_one_device
from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.metadata_reports import check_bounds, raise_report, read_at_once, report_word
from shardwise.ops.registry import TRITON
from shardwise.ops.state_batch import load_bounds, prefill_bounds
from shardwise.ops.triton_support import tl, triton
from shardwise.plan_cache import PlanCache, allocator

_Make = Callable[..., list[torch.Tensor]]
"""Operator, position_ids, cu_seqlen and seq_len_with_cache -> what `token_positions` gives"""
# By counts and layout of a step's metadata.
PLANS: PlanCache[_Make] = PlanCache()


def fake_token_positions(position_ids, batch_info_host, cu_seqlen, seq_len_with_cache):
    """Fake of the operators that prepare a step's metadata."""
    return [position_ids.new_empty(position_ids.numel(), dtype=torch.int32) for _ in range(2)]


def token_positions(
    op: str,
    family: str,
    batch: Batch,
    position_ids: torch.Tensor,  # [b, s]
    cu_seqlen: torch.Tensor,  # int [sequences + 1 and more]
    seq_len_with_cache: torch.Tensor,  # int [sequences and more]
) -> list[torch.Tensor]:
    """Sequence and absolute position of every token, both int32 [b * s]; -1 for padding after the last token.

    Starts a new step: the family's plans become stale. A cu_seqlen that does not ascend from 0 to the prefill tokens
    raises ValueError. Nothing is read from a GPU, where one kernel makes both; there the operator's next call raises,
    and such bounds give positions of sequences that exist.
    """
    tensors = position_ids, cu_seqlen, seq_len_with_cache
    make = PLANS.get(batch, tensors) or PLANS.keep(batch, tensors, _plan(op, batch, *tensors))
    planner(family, position_ids.device).reset()
    if read_at_once(cu_seqlen):
        prefill_bounds(op, batch, cu_seqlen)
    return make(op, *tensors)


def _plan(op: str, batch: Batch, position_ids, cu_seqlen, seq_len_with_cache) -> _Make:
    count, tokens, sequences = position_ids.numel(), batch.tokens, batch.sequences
    if tokens > count:
        raise ValueError(f"{op}: batch_info_host counts {tokens} tokens, position_ids holds {count}")
    if cu_seqlen.dim() != 1 or seq_len_with_cache.dim() != 1:
        came = f"{list(cu_seqlen.shape)} and {list(seq_len_with_cache.shape)}"
        raise ValueError(f"{op}: cu_seqlen and seq_len_with_cache have shapes {came}; legal: one dimension")
    if batch.prefill and cu_seqlen.numel() <= sequences:
        raise ValueError(f"{op}: cu_seqlen has {cu_seqlen.numel()} entries; legal: {sequences + 1} and more")
    if seq_len_with_cache.numel() < sequences:
        raise ValueError(
            f"{op}: seq_len_with_cache has {seq_len_with_cache.numel()} entries; legal: {sequences} and more"
        )
    require_one_device(op, position_ids, cu_seqlen, seq_len_with_cache)
    if position_ids.is_cuda and TRITON.state[0]:
        return _by_kernel(batch, position_ids, cu_seqlen, seq_len_with_cache)
    return lambda _op, *tensors: _by_torch(batch, *tensors)


def _by_torch(batch: Batch, position_ids, cu_seqlen, seq_len_with_cache) -> list[torch.Tensor]:
    count, tokens, sequences = position_ids.numel(), batch.tokens, batch.sequences
    lengths = seq_len_with_cache[:sequences].int()
    token = torch.arange(tokens, dtype=torch.int32, device=position_ids.device)
    if batch.prefill == 0:
        batch_indices, positions = token, lengths - 1
    else:
        ends = cu_seqlen[1 : sequences + 1].int()
        batch_indices = torch.searchsorted(ends, token, right=True, out_int32=True)
        positions = (lengths - ends)[batch_indices] + token
    if tokens == count:
        return [batch_indices, positions]
    padding = token.new_full((count - tokens,), -1)
    return [torch.cat((batch_indices, padding)), torch.cat((positions, padding))]


@triton.jit(do_not_specialize=["count", "prefill", "prefill_tokens", "tokens"])
def _positions_kernel(
    bounds_ptr,
    length_ptr,
    owner_ptr,
    position_ptr,
    word_ptr,
    count,
    prefill,
    prefill_tokens,
    tokens,
    BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    decode, exists = token >= prefill_tokens, token < tokens
    owner = prefill + token - prefill_tokens  # of decode tokens; those of prefill are searched for
    begin = tl.zeros((BLOCK,), tl.int32)
    if tl.program_id(0) * BLOCK < prefill_tokens:
        before = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, prefill, SEQUENCES):
            j = first + tl.arange(0, SEQUENCES)
            ends = load_bounds(bounds_ptr + 1 + j, j < prefill, prefill_tokens)
            before += tl.sum(((ends[None, :] <= token[:, None]) & (j < prefill)[None, :]).to(tl.int32), axis=1)
            if tl.program_id(0) == 0:
                check_bounds(word_ptr, bounds_ptr, j, prefill, prefill_tokens)
        owner = tl.where(decode, owner, tl.minimum(before, prefill - 1))
        begin = load_bounds(bounds_ptr + 1 + owner, exists & (token < prefill_tokens), prefill_tokens).to(tl.int32)
    length = tl.load(length_ptr + owner, mask=exists, other=0).to(tl.int32)
    position = tl.where(decode, length - 1, length - begin + token)
    position = tl.maximum(tl.minimum(position, length - 1), 0)
    tl.store(owner_ptr + token, tl.where(exists, owner, -1), mask=token < count)
    tl.store(position_ptr + token, tl.where(exists, position, -1), mask=token < count)


_positions = Kernel(_positions_kernel)
_BLOCK = 128


def _by_kernel(batch: Batch, position_ids, cu_seqlen, seq_len_with_cache) -> _Make:
    """What makes both in one launch, which costs more to find out than to use."""
    count, device = position_ids.numel(), position_ids.device
    width = min(64, max(2, 1 << (batch.prefill - 1).bit_length())) if batch.prefill else 2
    allocate = allocator((count,), torch.int32, device)
    pointers = cu_seqlen, seq_len_with_cache, allocate(), allocate()  # for dtypes alone
    form, grid = _positions.form_for(device, pointers, (_BLOCK, width), warps=4), (-(-count // _BLOCK), 1, 1)
    free = count, batch.prefill, batch.prefill_tokens, batch.tokens

    def make(op: str, _position_ids, cu_seqlen, seq_len_with_cache) -> list[torch.Tensor]:
        raise_report(op)
        owner, position = allocate(), allocate()
        form(grid, (cu_seqlen.contiguous(), seq_len_with_cache.contiguous(), owner, position, report_word(op)), free)
        return [owner, position]

    return make
