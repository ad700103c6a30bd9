"""Triton kernels of the state-space scan: time steps, states at the cuts, outputs (steps: `ssd_step_kernels.py`).

The prefill tokens are cut into pieces that never cross a sequence (`metadata.py`). One kernel walks every sequence
from piece to piece and keeps the state in registers, so that per-piece states are written once, in the activations'
dtype, and never read back for a second pass. The outputs of all pieces follow in parallel: a program walks its piece
in short steps that carry the state along, so that the quadratic part is as narrow as a step.
"""

from shardwise.ops.mamba.metadata import first_piece
from shardwise.ops.metadata_reports import check_bounds, check_slots
from shardwise.ops.state_batch import load_bounds
from shardwise.ops.triton_support import await_alone, tl, triton


@triton.jit
def dot(a, b, added, EXACT: tl.constexpr):
    """added + a @ b in float32; float32 operands as three products of tf32 halves. `added` may be None."""
    if EXACT:
        product = tl.dot(a, b, added, input_precision="tf32x3")
    else:
        product = tl.dot(a, b, added)
    return product


@triton.jit
def time_step(dt, bias, low, high):
    """clamp(softplus(dt + bias)): the identity above 20, a series below -8 where 1 + e loses e's digits."""
    dt = dt.to(tl.float32) + bias.to(tl.float32)
    e = tl.exp(tl.minimum(dt, 20.0))
    dt = tl.where(dt > 20.0, dt, tl.where(dt < -8.0, e - 0.5 * e * e, tl.log(1.0 + e)))
    return tl.minimum(tl.maximum(dt, low), high)


@triton.jit
def piece_bounds(index_ptr, offset_ptr, owner_ptr, bounds_ptr, piece, sequences, tokens, CHUNK: tl.constexpr):
    """(sequence, first token, end) of a piece; sequence -1 for an unused entry, or one that leads out of the tokens."""
    index = tl.load(index_ptr + piece)
    start = index * CHUNK + tl.load(offset_ptr + piece)
    exists = (index >= 0) & (start >= 0) & (start < tokens)
    owner = tl.load(owner_ptr + start, mask=exists, other=-1)
    exists = (owner >= 0) & (owner < sequences)
    end = load_bounds(bounds_ptr + owner + 1, exists, tokens)
    return tl.where(exists, owner, -1), start, tl.minimum(end, (index + 1) * CHUNK)


@triton.jit
def workspace_parts(workspace_ptr, heads, tokens, STATE: tl.constexpr):
    """(running sums, levels, states before the pieces) in the workspace that the three prefill kernels share.

    float32 [2, H, T], up to a multiple of 16 bytes, then STATE [pieces, H, N, P].
    """
    sums = heads.to(tl.int64) * tokens
    state_ptr = workspace_ptr + tl.cdiv(2 * sums, 4) * 4
    return workspace_ptr, workspace_ptr + sums, state_ptr.to(tl.pointer_type(STATE), bitcast=True)


@triton.jit(do_not_specialize=["sequences", "tokens", "heads", "low", "high"])
def steps_kernel(
    dt_ptr,
    bias_ptr,
    A_ptr,
    index_ptr,
    offset_ptr,
    owner_ptr,
    bounds_ptr,
    workspace_ptr,
    sequences,
    tokens,
    heads,
    low,
    high,
    dt_t,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Running sums of dt * A inside one piece [H, T] and, for HEADS heads, `level` = running sum - log(dt), float32.

    Of token j's input, exp(total_i - level_j) is left at token i: its time step and the decay since in one number.
    """
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    piece = tl.program_id(0)
    await_alone(PDL)
    owner, start, end = piece_bounds(index_ptr, offset_ptr, owner_ptr, bounds_ptr, piece, sequences, tokens, CHUNK)
    if owner < 0:
        return
    row = start + tl.arange(0, BLOCK)
    mask = (row < end)[:, None] & (head < heads)[None, :]
    bias = tl.load(bias_ptr + head, mask=head < heads, other=0.0)
    A = tl.load(A_ptr + head, mask=head < heads, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + row.to(tl.int64)[:, None] * dt_t + head[None, :], mask=mask, other=0.0)
    step = tl.where(mask, time_step(dt, bias[None, :], low, high), 0.0)
    total = tl.cumsum(step * A[None, :], axis=0)
    total_ptr, level_ptr, _ = workspace_parts(workspace_ptr, heads, tokens, tl.float32)
    target = head.to(tl.int64)[None, :] * tokens + row[:, None]
    tl.store(total_ptr + target, total, mask=mask)
    tl.store(level_ptr + target, total - tl.log(tl.where(mask, step, 1.0)), mask=mask)


@triton.jit(do_not_specialize=["pieces", "tokens", "heads", "slots"])
def states_kernel(
    x_ptr,
    B_ptr,
    bounds_ptr,
    slot_ptr,
    resume_ptr,
    cache_ptr,
    workspace_ptr,
    word_ptr,
    pieces,
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
    STEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SEQUENCES: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One sequence, head and tile of its state [N, P], from piece to piece; writes the state before every piece.

    Bad bounds can make more pieces than the workspace holds; the states of the rest are not written.
    """
    sequence, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p = (tl.program_id(2) // tl.cdiv(N, BLOCK_N)) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tl.program_id(2) % tl.cdiv(N, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    await_alone(PDL)
    slot = tl.load(slot_ptr + sequence).to(tl.int64)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        check_bounds(word_ptr, bounds_ptr, sequence, tl.num_programs(0), tokens)
        check_slots(word_ptr, True, sequence, slot, slots)
    start = load_bounds(bounds_ptr + sequence, True, tokens)
    end = load_bounds(bounds_ptr + sequence + 1, True, tokens)
    if (start >= end) | (slot < 0) | (slot >= slots):
        return
    tile = (n < N)[:, None] & (p < P)[None, :]
    cached = cache_ptr + slot * cache_slot + head * cache_h + p[None, :] * cache_p + n[:, None]
    resume = tl.load(resume_ptr + sequence).to(tl.int1)
    state = tl.load(cached, mask=tile & resume, other=0.0).to(tl.float32)
    piece = first_piece(bounds_ptr, sequence, tokens, CHUNK, SEQUENCES) - start // CHUNK
    x_ptr += head * x_h
    B_ptr += (head // RATIO) * B_g
    total_ptr, level_ptr, piece_state_ptr = workspace_parts(workspace_ptr, heads, tokens, x_ptr.dtype.element_ty)
    total_ptr += head * tokens
    level_ptr += head * tokens
    # One loop over all pieces, so that loads are on their way across their borders: the first piece ends at a multiple
    # of CHUNK, of which STEP is a divisor.
    first_stop = tl.minimum((start // CHUNK + 1) * CHUNK, end)
    first_steps = tl.cdiv(first_stop - start, STEP)
    for i in range(first_steps + tl.cdiv(end - first_stop, STEP)):
        begin = tl.where(i < first_steps, start + i * STEP, first_stop + (i - first_steps) * STEP)
        opens = (i == 0) | (begin % CHUNK == 0)
        if opens:
            number = piece + begin // CHUNK
            before = piece_state_ptr + ((number.to(tl.int64) * heads + head) * N + n[:, None]) * P + p[None, :]
            tl.store(before, state.to(piece_state_ptr.dtype.element_ty), mask=tile & (number < pieces))
        stop = tl.minimum(tl.minimum(begin + STEP, (begin // CHUNK + 1) * CHUNK), end)
        row = begin + tl.arange(0, BLOCK_T)
        live = row < stop
        x_rows = x_ptr + row[:, None].to(tl.int64) * x_t + p[None, :]
        x = tl.load(x_rows, mask=live[:, None] & (p < P)[None, :], other=0.0)
        B_rows = B_ptr + row[None, :].to(tl.int64) * B_t + n[:, None]
        B = tl.load(B_rows, mask=live[None, :] & (n < N)[:, None], other=0.0)
        level = tl.load(level_ptr + row, mask=live, other=float("inf"))
        last = tl.load(total_ptr + stop - 1)
        reached = tl.load(total_ptr + begin - 1, mask=begin > start, other=0.0)
        decay = tl.exp(last - tl.where(opens, 0.0, reached))
        state = dot(B, (x.to(tl.float32) * tl.exp(last - level)[:, None]).to(B.dtype), state * decay, EXACT)
    tl.store(cached, state.to(cache_ptr.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=["sequences", "tokens", "heads", "slots"])
def outputs_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    index_ptr,
    offset_ptr,
    owner_ptr,
    bounds_ptr,
    slot_ptr,
    workspace_ptr,
    out_ptr,
    sequences,
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
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Outputs of one piece and HEADS heads of a group: BLOCK_T tokens at a time, the states going along in registers.

    B, C and their products are the same for all heads of a group.
    """
    blocks = heads // HEADS  # heads change fastest: those of a group find B and C in the cache
    piece, head = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64) * HEADS
    await_alone(PDL)
    owner, start, end = piece_bounds(index_ptr, offset_ptr, owner_ptr, bounds_ptr, piece, sequences, tokens, CHUNK)
    if owner < 0:
        return
    i, p, n = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    slot = tl.load(slot_ptr + owner)
    out_ptr += head * P
    if (slot < 0) | (slot >= slots):
        for begin in range(start, end, BLOCK_T):
            target = out_ptr + (begin + i)[:, None].to(tl.int64) * heads * P + p[None, :]
            mask = (begin + i < end)[:, None] & (p < P)[None, :]
            for h in tl.static_range(HEADS):
                tl.store(target + h * P, tl.zeros((BLOCK_T, BLOCK_P), out_ptr.dtype.element_ty), mask=mask)
        return
    x_ptr += head * x_h
    B_ptr += (head // RATIO) * B_g
    C_ptr += (head // RATIO) * C_g
    total_ptr, level_ptr, piece_state_ptr = workspace_parts(workspace_ptr, heads, tokens, x_ptr.dtype.element_ty)
    total_ptr += head * tokens
    level_ptr += head * tokens
    before = piece_state_ptr + ((piece * heads + head) * N + n[:, None]) * P + p[None, :]
    states, reached = (), ()  # reached: the running sums before these tokens
    for h in tl.static_range(HEADS):
        state = tl.load(before + h * N * P, mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)
        states = states + (state.to(tl.float32),)  # type: ignore[assignment]
        reached = reached + (tl.zeros((), tl.float32),)  # type: ignore[assignment]
    for begin in range(start, end, BLOCK_T):
        row = begin + i
        live = row < end
        C_rows = C_ptr + row[:, None].to(tl.int64) * C_t + n[None, :]
        C = tl.load(C_rows, mask=live[:, None] & (n < N)[None, :], other=0.0)
        B_rows = B_ptr + row[None, :].to(tl.int64) * B_t + n[:, None]
        B = tl.load(B_rows, mask=live[None, :] & (n < N)[:, None], other=0.0)
        products = dot(C, B, None, EXACT)
        new_states, new_reached = (), ()
        for h in tl.static_range(HEADS):
            x_rows = x_ptr + h * x_h + row[:, None].to(tl.int64) * x_t + p[None, :]
            written = live[:, None] & (p < P)[None, :]
            x = tl.load(x_rows, mask=written, other=0.0)
            sums = total_ptr + h * tokens
            total = tl.load(sums + row, mask=live, other=0.0)
            last = tl.load(sums + tl.minimum(begin + BLOCK_T, end) - 1)
            level = tl.load(level_ptr + h * tokens + row, mask=live, other=float("inf"))
            out = dot(C, states[h].to(C.dtype), None, EXACT) * tl.exp(total - reached[h])[:, None]
            gap = tl.where(i[None, :] <= i[:, None], total[:, None] - level[None, :], float("-inf"))
            out = dot((products * tl.exp(gap)).to(x.dtype), x, out, EXACT)
            kept = (x.to(tl.float32) * tl.exp(last - level)[:, None]).to(B.dtype)
            new_states = new_states + (dot(B, kept, states[h] * tl.exp(last - reached[h]), EXACT),)
            new_reached = new_reached + (last,)
            out += tl.load(D_ptr + head + h).to(tl.float32) * x.to(tl.float32)
            target = out_ptr + h * P + row[:, None].to(tl.int64) * heads * P + p[None, :]
            tl.store(target, out.to(out_ptr.dtype.element_ty), mask=written)
        states, reached = new_states, new_reached
