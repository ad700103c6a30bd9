"""Triton kernels of the causal convolution in place: halos, blocks of prefill tokens (steps: `conv_step_kernels.py`).

Prefill tokens are cut into blocks that never cross a sequence. A block's result replaces inputs that its successor
needs, so `save_kernel` first copies the K - 1 inputs before every block (its halo) and brings the state caches up to
date. `prefill_kernel` then walks over the rows of all blocks in parallel.
"""

from shardwise.ops.metadata_reports import check_bounds, check_slots
from shardwise.ops.ptx import silu
from shardwise.ops.state_batch import load_bounds
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def find_block(bounds_ptr, sequences, tokens, block, rows, SEQUENCES: tl.constexpr):
    """(sequence, its first token, its end, tokens before the block); sequence == sequences for unused blocks.

    Whatever the bounds hold, start and end lie within the `tokens` of prefill. Only where bad ones make block counts
    overflow 32 bits may a block begin behind its sequence's end: it has no tokens.
    """
    j = tl.arange(0, SEQUENCES)
    low = load_bounds(bounds_ptr + j, j < sequences, tokens)
    high = load_bounds(bounds_ptr + j + 1, j < sequences, tokens)
    ends = tl.cumsum(tl.cdiv(tl.maximum(high - low, 0), rows), axis=0)
    done = (ends <= block) & (j < sequences)
    sequence = tl.sum(done.to(tl.int32), axis=0)
    before = tl.max(tl.where(done, ends, 0), axis=0)
    start = load_bounds(bounds_ptr + sequence, sequence < sequences, tokens).to(tl.int64)
    end = load_bounds(bounds_ptr + sequence + 1, sequence < sequences, tokens).to(tl.int64)
    return sequence, start, end, (block - before).to(tl.int64) * rows


@triton.jit
def load_taps(weight_ptr, c, channels, K: tl.constexpr):
    """The K weights [CHANNELS] of every channel, float32. Four taps are loaded as they lie and taken apart."""
    mask = c < channels
    taps = ()
    if K == 4:
        k = tl.arange(0, 4)
        tile = tl.load(weight_ptr + c[:, None] * 4 + k[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
        even, odd = tl.split(tile.reshape(tile.shape[0], 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        taps = (first, second, third, fourth)  # type: ignore[assignment]
    else:
        for k in tl.static_range(K):
            tap = tl.load(weight_ptr + c * K + k, mask=mask, other=0.0).to(tl.float32)
            taps = taps + (tap,)  # type: ignore[assignment]
    return taps


@triton.jit(do_not_specialize=["sequences", "tokens", "slots", "rows"])
def save_kernel(
    x_ptr,
    bounds_ptr,
    slot_ptr,
    resume_ptr,
    cache_ptr,
    halo_ptr,
    word_ptr,
    sequences,
    tokens,
    slots,
    rows,
    channels,
    x_t,
    x_c,
    cache_slot,
    cache_c,
    cache_k,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Inputs before one block into its halo; at a sequence's first block also its new state into the cache."""
    await_predecessor(PDL)
    if tl.program_id(0) == 0:
        j = tl.arange(0, SEQUENCES)
        check_bounds(word_ptr, bounds_ptr, j, sequences, tokens)
        check_slots(word_ptr, j < sequences, j, tl.load(slot_ptr + j, mask=j < sequences, other=-1), slots)
    tiles = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) // tiles
    sequence, start, end, local = find_block(bounds_ptr, sequences, tokens, block, rows, SEQUENCES)
    if sequence >= sequences:
        return
    slot = tl.load(slot_ptr + sequence).to(tl.int64)
    if (slot < 0) | (slot >= slots) | (local >= end - start):
        return
    k = tl.arange(0, TAPS)[:, None]
    c = (tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    mask = (k < K - 1) & (c < channels)
    saved = halo_ptr + (block.to(tl.int64) * (K - 1) + k) * channels + c
    above = x_ptr + (start + k - (K - 1)) * x_t + c.to(tl.int64) * x_c
    if local > 0:
        tl.store(saved, tl.load(above + local * x_t, mask=mask, other=0.0), mask=mask)
        return
    resume = tl.load(resume_ptr + sequence).to(tl.int1)
    cached = cache_ptr + slot * cache_slot + c.to(tl.int64) * cache_c
    past = tl.load(cached + k * cache_k, mask=mask & resume, other=0.0)
    length = end - start
    last = length + k - (K - 1)
    fresh = tl.load(above + length * x_t, mask=mask & (last >= 0), other=0.0)
    kept = tl.load(cached + (length + k) * cache_k, mask=mask & resume & (last < 0), other=0.0)
    tl.debug_barrier()
    tl.store(saved, past.to(halo_ptr.dtype.element_ty), mask=mask)
    tl.store(cached + k * cache_k, tl.where(last >= 0, fresh.to(cache_ptr.dtype.element_ty), kept), mask=mask)


@triton.jit
def load_rows(row_ptr, first, count, stride, mask, ROWS: tl.constexpr):
    """Rows first to first + ROWS - 1 as a tuple; zeros from row `count` on."""
    rows = ()
    for i in tl.static_range(ROWS):
        row = tl.load(row_ptr + (first + i) * stride, mask=mask & (first + i < count), other=0.0)
        rows = rows + (row,)  # type: ignore[assignment]
    return rows


@triton.jit(do_not_specialize=["sequences", "tokens", "slots", "rows"])
def prefill_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    bounds_ptr,
    slot_ptr,
    halo_ptr,
    sequences,
    tokens,
    slots,
    rows,
    channels,
    x_t,
    x_c,
    K: tl.constexpr,
    AHEAD: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block of tokens and channels: a walk over its rows, K - 1 inputs in registers and AHEAD rows on their way.

    A thread owns its channels, so that nobody else reads what it overwrites.
    """
    await_predecessor(PDL)
    tiles = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) // tiles
    sequence, start, end, local = find_block(bounds_ptr, sequences, tokens, block, rows, SEQUENCES)
    if sequence >= sequences:
        return
    slot = tl.load(slot_ptr + sequence)
    if (slot < 0) | (slot >= slots):
        return
    c = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    row_ptr = x_ptr + (start + local) * x_t + c.to(tl.int64) * x_c
    count = tl.minimum(end - start - local, rows).to(tl.int32)
    ahead = load_rows(row_ptr, 0, count, x_t, mask, AHEAD)
    past = load_rows(halo_ptr + block.to(tl.int64) * (K - 1) * channels + c, 0, K - 1, channels, mask, K - 1)
    taps = load_taps(weight_ptr, c, channels, K)
    offset = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        offset = tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    for first in range(0, count, AHEAD):
        now = ahead
        ahead = load_rows(row_ptr, first + AHEAD, count, x_t, mask, AHEAD)
        for i in tl.static_range(AHEAD):
            out = offset + now[i].to(tl.float32) * taps[K - 1]
            for k in tl.static_range(K - 1):
                out += past[k].to(tl.float32) * taps[k]
            past = past[1:] + (now[i],)
            if SILU:
                out = silu(out)
            target = row_ptr + (first + i) * x_t
            tl.store(target, out.to(x_ptr.dtype.element_ty), mask=mask & (first + i < count))
