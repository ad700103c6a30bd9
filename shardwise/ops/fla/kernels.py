"""Triton kernels around fla's: states in and out of the cache, chunks of several sequences, the decode step."""

from shardwise.ops.fla.rule_kernels import stepped
from shardwise.ops.metadata_reports import check_bounds, check_slots
from shardwise.ops.state_batch import load_bounds
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def is_live(bounds_ptr, slot_ptr, sequence, slots):
    """Whether a prefill sequence has tokens and a row in the cache."""
    slot = tl.load(slot_ptr + sequence)
    tokens = tl.load(bounds_ptr + sequence + 1) - tl.load(bounds_ptr + sequence)
    return (slot >= 0) & (slot < slots) & (tokens > 0)


@triton.jit(do_not_specialize=["slots"])
def load_states_kernel(
    bounds_ptr,
    slot_ptr,
    resume_ptr,
    cache_ptr,
    state_ptr,
    slots,
    cache_slot,
    cache_h,
    cache_k,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """Float32 states [sequences, HEADS, K, V] before the first token: a sequence's row, or zeros."""
    await_predecessor(PDL)
    sequence, head = tl.program_id(0) // HEADS, (tl.program_id(0) % HEADS).to(tl.int64)
    k, v = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    inside = (k < K)[:, None] & (v < V)[None, :]
    taken = is_live(bounds_ptr, slot_ptr, sequence, slots) & tl.load(resume_ptr + sequence).to(tl.int1)
    row = cache_ptr + tl.load(slot_ptr + sequence).to(tl.int64) * cache_slot + head * cache_h
    state = tl.load(row + k[:, None] * cache_k + v[None, :], mask=inside & taken, other=0.0)
    target = state_ptr + tl.program_id(0).to(tl.int64) * K * V + k[:, None] * V + v[None, :]
    tl.store(target, state.to(tl.float32), mask=inside)


@triton.jit
def larger(a, b):
    """The maximum of two, for scans."""
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["sequences", "tokens", "chunks"])
def chunks_kernel(
    bounds_ptr,
    safe_ptr,
    chunk_ptr,
    offset_ptr,
    sequences,
    tokens,
    chunks,
    CHUNK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The bounds made to ascend within the prefill tokens [sequences + 1], which fla trusts them to and good ones do;
    (sequence, chunk of that sequence) of every chunk [chunks, 2]; chunks before every sequence [sequences + 1].

    There is room for as many as there can be; what is left over names a chunk behind the end of the last sequence that
    has tokens, in which fla's kernels find none.
    """
    await_predecessor(PDL)
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SEQUENCES)
    first = load_bounds(bounds_ptr, True, tokens)
    low = tl.associative_scan(load_bounds(bounds_ptr + j, j < sequences, tokens), 0, larger)
    high = tl.associative_scan(load_bounds(bounds_ptr + j + 1, j < sequences, tokens), 0, larger)
    high = tl.maximum(high, first)
    if tl.program_id(0) == 0:
        tl.store(safe_ptr, first)
        tl.store(safe_ptr + j + 1, high, mask=j < sequences)
    ends = tl.cumsum(tl.cdiv(high - low, CHUNK), axis=0)
    if tl.program_id(0) == 0:
        tl.store(offset_ptr, 0)
        tl.store(offset_ptr + j + 1, ends.to(tl.int32), mask=j < sequences)
    done = (ends[None, :] <= i[:, None]) & (j < sequences)[None, :]
    sequence = tl.sum(done.to(tl.int32), axis=1)
    chunk = i - tl.max(tl.where(done, ends[None, :], 0), axis=1).to(tl.int32)
    beyond = sequence >= sequences
    last = tl.max(tl.where((low < high) & (j < sequences), j, 0), axis=0)
    tl.store(chunk_ptr + 2 * i, tl.where(beyond, last, sequence), mask=i < chunks)
    tl.store(chunk_ptr + 2 * i + 1, tl.where(beyond, chunks, chunk), mask=i < chunks)


@triton.jit
def store_states(
    program,
    bounds_ptr,
    slot_ptr,
    cache_ptr,
    state_ptr,
    slots,
    cache_slot,
    cache_h,
    cache_k,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_K rows of one of the states [sequences, HEADS, K, V] into its sequence's row of the cache."""
    parts: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    number = program // parts
    sequence, head = number // HEADS, (number % HEADS).to(tl.int64)
    k, v = program % parts * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    inside = (k < K)[:, None] & (v < V)[None, :]
    source = state_ptr + number.to(tl.int64) * K * V + k[:, None] * V + v[None, :]
    row = cache_ptr + tl.load(slot_ptr + sequence).to(tl.int64) * cache_slot + head * cache_h
    state = tl.load(source, mask=inside, other=0.0).to(cache_ptr.dtype.element_ty)
    live = is_live(bounds_ptr, slot_ptr, sequence, slots)
    tl.store(row + k[:, None] * cache_k + v[None, :], state, mask=inside & live)


@triton.jit
def drop_tokens(
    program,
    bounds_ptr,
    slot_ptr,
    out_ptr,
    word_ptr,
    sequences,
    slots,
    prefill,
    used,
    tokens,
    WIDTH: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zeros for prefill tokens (the first `prefill`) of sequences without a row, and for padding from `used` on."""
    i, j = program * ROWS + tl.arange(0, ROWS), tl.arange(0, SEQUENCES)
    # All that is read comes at once: slots are asked for by sequence, not by the token's owner.
    exists = j < sequences
    low = tl.load(bounds_ptr + j, mask=exists, other=0)
    high = tl.load(bounds_ptr + j + 1, mask=exists, other=0)
    slot = tl.load(slot_ptr + j, mask=exists, other=-1)
    held = (low[None, :] <= i[:, None]) & (i[:, None] < high[None, :]) & ((slot >= 0) & (slot < slots))[None, :]
    kept = (tl.max(held.to(tl.int32), axis=1) > 0) | ((i >= prefill) & (i < used))
    dropped = (i < tokens) & (kept == 0)
    if tl.max(dropped.to(tl.int32), axis=0) > 0:
        for begin in range(0, WIDTH, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            target = out_ptr + i.to(tl.int64)[:, None] * WIDTH + c[None, :]
            nothing = tl.zeros((ROWS, BLOCK), out_ptr.dtype.element_ty)
            tl.store(target, nothing, mask=dropped[:, None] & (c < WIDTH)[None, :])
    if program == 0:
        check_bounds(word_ptr, bounds_ptr, j, sequences, prefill)
        check_slots(word_ptr, exists, j, slot, slots)


@triton.jit(do_not_specialize=["state_programs", "sequences", "slots", "prefill", "used", "tokens"])
def finish_kernel(
    bounds_ptr,
    slot_ptr,
    cache_ptr,
    state_ptr,
    out_ptr,
    word_ptr,
    state_programs,
    sequences,
    slots,
    prefill,
    used,
    tokens,
    cache_slot,
    cache_h,
    cache_k,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """What follows fla's kernels, in one launch: the first programs store states, the others drop tokens
    and the first of those looks for bad metadata."""
    await_predecessor(PDL)
    program = tl.program_id(0)
    if program < state_programs:
        store_states(
            program, bounds_ptr, slot_ptr, cache_ptr, state_ptr, slots, cache_slot, cache_h, cache_k,
            HEADS, K, V, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    else:
        drop_tokens(
            program - state_programs, bounds_ptr, slot_ptr, out_ptr, word_ptr, sequences, slots, prefill, used,
            tokens, HEADS * V, SEQUENCES, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "skip", "slots", "scale"])
def step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    g_ptr,
    slot_ptr,
    cache_ptr,
    out_ptr,
    word_ptr,
    first,
    skip,
    slots,
    scale,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    beta_t,
    g_t,
    cache_slot,
    cache_h,
    cache_k,
    RATIO: tl.constexpr,  # heads of v that share one of q and k
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One decode token, one head and BLOCK_V columns of its state, which are read, stepped and written once.

    Programs lie in the order of a slot's memory. The decode tokens begin at token `first`, their slots at entry `skip`.
    """
    parts: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    number, head = tl.program_id(0) // parts // HEADS, (tl.program_id(0) // parts % HEADS).to(tl.int64)
    token = (first + number).to(tl.int64)
    k_rows, v_columns = tl.arange(0, BLOCK_K), tl.program_id(0) % parts * BLOCK_V + tl.arange(0, BLOCK_V)
    target = out_ptr + (token * HEADS + head) * V + v_columns
    await_predecessor(PDL)
    slot = tl.load(slot_ptr + skip + number).to(tl.int64)
    if (slot < 0) | (slot >= slots):
        check_slots(word_ptr, True, skip + number, slot, slots)
        tl.store(target, tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty), mask=v_columns < V)
        return
    tile = (k_rows < K)[:, None] & (v_columns < V)[None, :]
    cached = cache_ptr + slot * cache_slot + head * cache_h + k_rows[:, None] * cache_k + v_columns[None, :]
    state = tl.load(cached, mask=tile, other=0.0).to(tl.float32)
    q = tl.load(q_ptr + token * q_t + head // RATIO * q_h + k_rows, mask=k_rows < K, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + token * k_t + head // RATIO * k_h + k_rows, mask=k_rows < K, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + token * v_t + head * v_h + v_columns, mask=v_columns < V, other=0.0).to(tl.float32)
    if GATED:
        state *= tl.exp(tl.load(g_ptr + token * g_t + head).to(tl.float32))
    beta = tl.load(beta_ptr + token * beta_t + head).to(tl.float32)
    state, out = stepped(state, q, k, v, beta)
    tl.store(cached, state.to(cache_ptr.dtype.element_ty), mask=tile)
    tl.store(target, (scale * out).to(out_ptr.dtype.element_ty), mask=v_columns < V)
