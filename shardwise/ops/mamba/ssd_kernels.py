"""Triton kernels of the state-space scan: time steps, states at the cuts, outputs, and the decode step.

The prefill tokens are cut into pieces that never cross a sequence (`metadata.py`). One kernel walks every sequence
from piece to piece and keeps the state in registers, so that per-piece states are written once, in the activations'
dtype, and never read back for a second pass; outputs of all pieces follow in parallel.
"""

from shardwise.ops.mamba.metadata import first_piece
from shardwise.ops.triton_support import tl, triton


@triton.jit
def dot(a, b, EXACT: tl.constexpr):
    """Matrix product with float32 accumulation; float32 operands without tf32 rounding."""
    if EXACT:
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def time_step(dt, bias, low, high):
    """clamp(softplus(dt + bias)): the identity above 20, a series below -8 where 1 + e loses e's digits."""
    dt = dt.to(tl.float32) + bias.to(tl.float32)
    e = tl.exp(tl.minimum(dt, 20.0))
    dt = tl.where(dt > 20.0, dt, tl.where(dt < -8.0, e - 0.5 * e * e, tl.log(1.0 + e)))
    return tl.minimum(tl.maximum(dt, low), high)


@triton.jit
def piece_bounds(index_ptr, offset_ptr, owner_ptr, bounds_ptr, piece, CHUNK: tl.constexpr):
    """(sequence, first token, end) of a piece; sequence -1 for an unused entry."""
    index = tl.load(index_ptr + piece)
    start = index * CHUNK + tl.load(offset_ptr + piece)
    exists = index >= 0
    owner = tl.load(owner_ptr + start, mask=exists, other=-1)
    end = tl.load(bounds_ptr + owner + 1, mask=exists, other=0)
    return owner, start, tl.minimum(end, (index + 1) * CHUNK)


@triton.jit(do_not_specialize=["tokens", "heads", "low", "high"])
def steps_kernel(
    dt_ptr,
    bias_ptr,
    A_ptr,
    index_ptr,
    offset_ptr,
    owner_ptr,
    bounds_ptr,
    step_ptr,
    total_ptr,
    tokens,
    heads,
    low,
    high,
    dt_t,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Time steps [H, T] and the running sum of dt * A inside each piece [H, T], float32, for one (piece, head)."""
    head = tl.program_id(1)
    owner, start, end = piece_bounds(index_ptr, offset_ptr, owner_ptr, bounds_ptr, tl.program_id(0), CHUNK)
    if owner < 0:
        return
    row = start + tl.arange(0, BLOCK)
    mask = row < end
    dt = tl.load(dt_ptr + row.to(tl.int64) * dt_t + head, mask=mask, other=0.0)
    step = tl.where(mask, time_step(dt, tl.load(bias_ptr + head), low, high), 0.0)
    total = tl.cumsum(step * tl.load(A_ptr + head).to(tl.float32), axis=0)
    tl.store(step_ptr + head.to(tl.int64) * tokens + row, step, mask=mask)
    tl.store(total_ptr + head.to(tl.int64) * tokens + row, total, mask=mask)


@triton.jit(do_not_specialize=["tokens", "heads", "slots"])
def states_kernel(
    x_ptr,
    B_ptr,
    step_ptr,
    total_ptr,
    bounds_ptr,
    slot_ptr,
    resume_ptr,
    cache_ptr,
    piece_state_ptr,
    tokens,
    heads,
    slots,
    x_t,
    x_h,
    B_t,
    B_g,
    cache_slot,
    cache_h,
    cache_p,
    RATIO: tl.constexpr,  # heads of a group
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SEQUENCES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One sequence, head and tile of its state, from piece to piece; writes the state before every piece."""
    sequence, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p = (tl.program_id(2) // tl.cdiv(N, BLOCK_N)) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tl.program_id(2) % tl.cdiv(N, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slot_ptr + sequence).to(tl.int64)
    start, end = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    if (start >= end) | (slot < 0) | (slot >= slots):
        return
    tile = (p < P)[:, None] & (n < N)[None, :]
    cached = cache_ptr + slot * cache_slot + head * cache_h + p[:, None] * cache_p + n[None, :]
    resume = tl.load(resume_ptr + sequence).to(tl.int1)
    state = tl.load(cached, mask=tile & resume, other=0.0).to(tl.float32)
    piece = first_piece(bounds_ptr, sequence, CHUNK, SEQUENCES).to(tl.int64)
    x_ptr += head * x_h
    B_ptr += (head // RATIO) * B_g
    step_ptr += head * tokens
    total_ptr += head * tokens
    while start < end:
        stop = tl.minimum((start // CHUNK + 1) * CHUNK, end)
        before = piece_state_ptr + ((piece * heads + head) * P + p[:, None]) * N + n[None, :]
        tl.store(before, state.to(piece_state_ptr.dtype.element_ty), mask=tile)
        last = tl.load(total_ptr + stop - 1)
        state *= tl.exp(last)
        for begin in range(start, stop, BLOCK_T):
            row = begin + tl.arange(0, BLOCK_T)
            live = row < stop
            x = tl.load(
                x_ptr + row[None, :].to(tl.int64) * x_t + p[:, None], mask=live[None, :] & (p < P)[:, None], other=0.0
            )
            weight = tl.load(step_ptr + row, mask=live, other=0.0)
            weight *= tl.exp(last - tl.load(total_ptr + row, mask=live, other=0.0))
            B = tl.load(
                B_ptr + row[:, None].to(tl.int64) * B_t + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0
            )
            state += dot((x.to(tl.float32) * weight[None, :]).to(B.dtype), B, EXACT)
        start = stop
        piece += 1
    tl.store(cached, state.to(cache_ptr.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=["tokens", "heads", "slots"])
def outputs_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    step_ptr,
    total_ptr,
    index_ptr,
    offset_ptr,
    owner_ptr,
    bounds_ptr,
    slot_ptr,
    piece_state_ptr,
    out_ptr,
    tokens,
    heads,
    slots,
    x_t,
    x_h,
    B_t,
    B_g,
    C_t,
    C_g,
    RATIO: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXACT: tl.constexpr,
):
    """BLOCK_M outputs of one (piece, head): what the state before the piece gives, and the piece's own tokens."""
    piece, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    owner, start, end = piece_bounds(index_ptr, offset_ptr, owner_ptr, bounds_ptr, piece, CHUNK)
    first = start + tl.program_id(2) * BLOCK_M
    if (owner < 0) | (first >= end):
        return
    row, p, n = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    live = row < end
    slot = tl.load(slot_ptr + owner)
    target = out_ptr + (row[:, None].to(tl.int64) * heads + head) * P + p[None, :]
    written = live[:, None] & (p < P)[None, :]
    if (slot < 0) | (slot >= slots):
        tl.store(target, tl.zeros((BLOCK_M, BLOCK_P), out_ptr.dtype.element_ty), mask=written)
        return
    x_ptr += head * x_h
    B_ptr += (head // RATIO) * B_g
    C_ptr += (head // RATIO) * C_g
    step_ptr += head * tokens
    total_ptr += head * tokens
    C = tl.load(C_ptr + row[:, None].to(tl.int64) * C_t + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
    total = tl.load(total_ptr + row, mask=live, other=0.0)
    before = piece_state_ptr + ((piece * heads + head) * P + p[None, :]) * N + n[:, None]
    state = tl.load(before, mask=(p < P)[None, :] & (n < N)[:, None], other=0.0)
    out = dot(C, state, EXACT) * tl.exp(total)[:, None]
    for begin in range(start, tl.minimum(first + BLOCK_M, end), BLOCK_T):
        other = begin + tl.arange(0, BLOCK_T)
        known = other < end
        B = tl.load(
            B_ptr + other[None, :].to(tl.int64) * B_t + n[:, None], mask=known[None, :] & (n < N)[:, None], other=0.0
        )
        gap = total[:, None] - tl.load(total_ptr + other, mask=known, other=0.0)[None, :]
        gap = tl.exp(tl.where(other[None, :] <= row[:, None], gap, float("-inf")))
        scores = dot(C, B, EXACT) * gap * tl.load(step_ptr + other, mask=known, other=0.0)[None, :]
        x = tl.load(
            x_ptr + other[:, None].to(tl.int64) * x_t + p[None, :], mask=known[:, None] & (p < P)[None, :], other=0.0
        )
        out += dot(scores.to(x.dtype), x, EXACT)
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * x_t + p[None, :], mask=written, other=0.0)
    out += tl.load(D_ptr + head).to(tl.float32) * x.to(tl.float32)
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["first", "skip", "heads", "slots", "low", "high"])
def decode_kernel(
    x_ptr,
    dt_ptr,
    bias_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    slot_ptr,
    cache_ptr,
    out_ptr,
    first,
    skip,
    heads,
    slots,
    low,
    high,
    x_t,
    x_h,
    dt_t,
    B_t,
    B_g,
    C_t,
    C_g,
    cache_slot,
    cache_h,
    cache_p,
    RATIO: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One token: BLOCK_P rows of one head's state are read, stepped and written once.

    The decode tokens begin at token `first` and their slots at entry `skip`.
    """
    token, head = first + tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    slot = tl.load(slot_ptr + skip + tl.program_id(0)).to(tl.int64)
    target = out_ptr + (token * heads + head) * P + p
    if (slot < 0) | (slot >= slots):
        tl.store(target, tl.zeros((BLOCK_P,), out_ptr.dtype.element_ty), mask=p < P)
        return
    tile = (p < P)[:, None] & (n < N)[None, :]
    cached = cache_ptr + slot * cache_slot + head * cache_h + p[:, None] * cache_p + n[None, :]
    state = tl.load(cached, mask=tile, other=0.0).to(tl.float32)
    step = time_step(tl.load(dt_ptr + token * dt_t + head), tl.load(bias_ptr + head), low, high)
    x = tl.load(x_ptr + token * x_t + head * x_h + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + token * B_t + (head // RATIO) * B_g + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + token * C_t + (head // RATIO) * C_g + n, mask=n < N, other=0.0).to(tl.float32)
    state = state * tl.exp(step * tl.load(A_ptr + head).to(tl.float32)) + (step * x)[:, None] * B[None, :]
    tl.store(cached, state.to(cache_ptr.dtype.element_ty), mask=tile)
    out = tl.sum(state * C[None, :], axis=1) + tl.load(D_ptr + head).to(tl.float32) * x
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=p < P)
