"""Where the chunked scan cuts a batch of several sequences.

Cuts lie at every multiple of the chunk size and at every sequence's start, so that a piece belongs to one sequence.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.kernel_launch import Kernel, Launch
from shardwise.ops.metadata_reports import check_bounds, raise_report, read_at_once, report_word
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.state_batch import load_bounds, prefill_bounds
from shardwise.ops.triton_support import tl, triton
from shardwise.plan_cache import PlanCache, allocator


def _metadata(position_ids, batch_info_host, seq_len, cu_seqlen, chunk_size):
    tokens = position_ids.numel() if position_ids.dim() == 2 and position_ids.shape[1] > 1 else 0
    device = (position_ids if cu_seqlen is None else cu_seqlen).device
    return [torch.empty(shape, dtype=torch.int32, device=device) for shape in ((tokens,), (tokens,), (1, tokens))]


@operator(fake=_metadata)
def mamba_ssm_prepare_metadata(
    position_ids: torch.Tensor,
    batch_info_host: torch.Tensor,
    seq_len: torch.Tensor,
    cu_seqlen: torch.Tensor,
    chunk_size: int,
) -> list[torch.Tensor]:
    """int32 chunk_indices and chunk_offsets (the physical chunk of every piece, and where in it the piece begins)
    and seq_idx_prefill [1, prefill tokens] (the sequence of every token), on cu_seqlen's device. A step without prefill
    tokens reads neither seq_len nor cu_seqlen, which may be None.

    On a CUDA device nothing is synchronised: the first two have the length min(tokens, cdiv(tokens, chunk_size) +
    sequences - 1), which no batch exceeds, and -1 where there is no piece. The fake gives upper bounds.

    A cu_seqlen that does not ascend from 0 to the prefill tokens raises ValueError, on a CUDA device in the next call
    (`metadata_reports.py`). There such bounds give wrong pieces and sequences, or none (-1, and the number of
    sequences), with which the operators stay inside of their tensors.
    """
    op = "mamba_ssm_prepare_metadata"
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be positive, got {chunk_size}")
    batch = read_batch(op, batch_info_host)
    on_device = cu_seqlen is not None and cu_seqlen.is_cuda and TRITON.state[0]
    if on_device:
        raise_report(op)
    if not batch.prefill_tokens:
        device = (position_ids if cu_seqlen is None else cu_seqlen).device
        return [torch.empty(shape, dtype=torch.int32, device=device) for shape in ((0,), (0,), (1, 0))]
    if not on_device or read_at_once(cu_seqlen):
        bounds = prefill_bounds(op, batch, cu_seqlen)
    return _on_device(op, batch, cu_seqlen, chunk_size) if on_device else _on_host(bounds, chunk_size, cu_seqlen.device)


def _on_host(bounds: list[int], chunk: int, device: torch.device) -> list[torch.Tensor]:
    cuts = sorted({*range(0, bounds[-1], chunk), *(begin for begin in bounds[:-1] if begin < bounds[-1])})
    rows = [[cut // chunk for cut in cuts], [cut % chunk for cut in cuts]]
    sequences = [i for i in range(len(bounds) - 1) for _ in range(bounds[i], bounds[i + 1])]
    return [torch.tensor(row, dtype=torch.int32, device=device) for row in (*rows, [sequences])]


@triton.jit
def first_piece(bounds_ptr, sequence, tokens, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """How many pieces lie before the start of `sequence`."""
    count = tl.cdiv(load_bounds(bounds_ptr + sequence, True, tokens), CHUNK)
    for begin in range(0, sequence, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        low = load_bounds(bounds_ptr + j, j < sequence, tokens)
        high = load_bounds(bounds_ptr + j + 1, j < sequence, tokens)
        count += tl.sum(((low < high) & (low % CHUNK != 0)).to(tl.int32), axis=0)
    return count


@triton.jit(do_not_specialize=["sequences", "tokens", "pieces"])
def _pieces_kernel(
    bounds_ptr,
    index_ptr,
    offset_ptr,
    owner_ptr,
    word_ptr,
    sequences,
    tokens,
    pieces,
    CHUNK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, SEQUENCES)
    low = load_bounds(bounds_ptr + j, j < sequences, tokens)
    high = load_bounds(bounds_ptr + j + 1, j < sequences, tokens)
    if tl.program_id(0) == 0:
        check_bounds(word_ptr, bounds_ptr, j, sequences, tokens)
    owner = tl.sum(((high[None, :] <= i[:, None]) & (j < sequences)[None, :]).to(tl.int32), axis=1)
    tl.store(owner_ptr + i, owner, mask=i < tokens)
    # Pieces up to the end of sequence j: whole chunks, and one more for every start inside a chunk.
    ends = tl.cdiv(high, CHUNK) + tl.cumsum(((low < high) & (low % CHUNK != 0)).to(tl.int32), axis=0)
    done = (ends[None, :] <= i[:, None]) & (j < sequences)[None, :]
    owner = tl.sum(done.to(tl.int32), axis=1)
    before = tl.max(tl.where(done, ends[None, :], 0), axis=1)
    start = load_bounds(bounds_ptr + owner, owner < sequences, tokens)
    local = i - before
    cut = tl.where(local == 0, start, (start // CHUNK + local) * CHUNK)
    exists = (owner < sequences) & (cut < tokens)
    tl.store(index_ptr + i, tl.where(exists, cut // CHUNK, -1), mask=i < pieces)
    tl.store(offset_ptr + i, tl.where(exists, cut % CHUNK, -1), mask=i < pieces)


_pieces = Kernel(_pieces_kernel)
_BLOCK = 128


class _Plan(NamedTuple):
    """A launch, which costs more to find out than to use."""

    launch: Launch
    pieces: Callable[[], torch.Tensor]
    """Allocates one entry a piece"""
    tokens: Callable[[], torch.Tensor]
    """Allocates [1, tokens]"""


# By counts, chunk size and layout of cu_seqlen.
PLANS: PlanCache[_Plan] = PlanCache()


def _plan(op: str, batch: Batch, cu_seqlen: torch.Tensor, chunk: int) -> _Plan:
    if cu_seqlen.numel() < batch.prefill + 1:
        raise ValueError(f"{op}: cu_seqlen has {cu_seqlen.numel()} entries; {batch.prefill} sequences need one more")
    tokens, device = batch.prefill_tokens, cu_seqlen.device
    pieces = min(tokens, -(-tokens // chunk) + batch.prefill - 1)
    width = max(1 << (batch.prefill - 1).bit_length(), 2)
    form = _pieces.form_for(device, (cu_seqlen,), (chunk, width, _BLOCK), warps=4)
    return _Plan(
        Launch(form, (-(-tokens // _BLOCK), 1, 1), (batch.prefill, tokens, pieces)),
        allocator((pieces,), torch.int32, device),
        allocator((1, tokens), torch.int32, device),
    )


def _on_device(op: str, batch: Batch, cu_seqlen: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    key, layout = (batch, chunk), (cu_seqlen,)
    plan = PLANS.get(key, layout) or PLANS.keep(key, layout, _plan(op, batch, cu_seqlen, chunk))
    result = [plan.pieces(), plan.pieces(), plan.tokens()]
    plan.launch.form(plan.launch.grid, (cu_seqlen.contiguous(), *result, report_word(op)), plan.launch.free)
    return result
