"""Triton kernels of the state-space step, one token of every sequence: our own, and what FlashInfer's reads."""

from shardwise.ops.mamba.ssd_kernels import time_step
from shardwise.ops.metadata_reports import check_slots
from shardwise.ops.triton_support import await_predecessor, tl, triton


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
    word_ptr,
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
    MASKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: BLOCK_P rows of one head's state are read, stepped and written once.

    Programs lie in the order of a slot's memory, so that those that run together read neighbouring pages. The decode
    tokens begin at token `first` and their slots at entry `skip`. MASKED carries a token without a slot through to its
    zeros by masks; without it the program of such a token returns early.
    """
    parts: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = (tl.program_id(0) // parts % heads).to(tl.int64)
    number = tl.program_id(0) // parts // heads
    token = first + number.to(tl.int64)
    p = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    await_predecessor(PDL)
    slot = tl.load(slot_ptr + skip + number).to(tl.int64)
    target = out_ptr + (token * heads + head) * P + p
    held = (slot >= 0) & (slot < slots)
    tile = (p < P)[:, None] & (n < N)[None, :]
    if MASKED:
        tile = tile & held
    elif not held:
        check_slots(word_ptr, True, skip + number, slot, slots)
        tl.store(target, tl.zeros((BLOCK_P,), out_ptr.dtype.element_ty), mask=p < P)
        return
    cached = cache_ptr + slot * cache_slot + head * cache_h + p[:, None] * cache_p + n[None, :]
    state = tl.load(cached, mask=tile, other=0.0).to(tl.float32)
    step = time_step(tl.load(dt_ptr + token * dt_t + head), tl.load(bias_ptr + head), low, high)
    x = tl.load(x_ptr + token * x_t + head * x_h + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + token * B_t + (head // RATIO) * B_g + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + token * C_t + (head // RATIO) * C_g + n, mask=n < N, other=0.0).to(tl.float32)
    state = state * tl.exp(step * tl.load(A_ptr + head).to(tl.float32)) + (step * x)[:, None] * B[None, :]
    tl.store(cached, state.to(cache_ptr.dtype.element_ty), mask=tile)
    out = tl.sum(state * C[None, :], axis=1) + tl.load(D_ptr + head).to(tl.float32) * x
    if MASKED:
        out = tl.where(held, out, 0.0)
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=p < P)
    if MASKED:
        check_slots(word_ptr, True, skip + number, slot, slots)


@triton.jit
def copy_row(source_ptr, target_ptr, heads, head_stride, part, held, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Part `part` of a token's row [heads, SIZE] to a dense one; zeros where the token is not held."""
    i = part * BLOCK + tl.arange(0, BLOCK)
    mask = i < heads * SIZE
    row = tl.load(source_ptr + (i // SIZE).to(tl.int64) * head_stride + i % SIZE, mask=mask & held, other=0.0)
    tl.store(target_ptr + i, row, mask=mask)


@triton.jit(do_not_specialize=["first", "skip", "heads", "slots", "low", "high"])
def ready_kernel(
    x_ptr,
    dt_ptr,
    bias_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    slot_ptr,
    out_ptr,
    number_ptr,
    index_ptr,
    row_ptr,
    word_ptr,
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
    RATIO: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,  # a power of two that holds all
    BLOCK: tl.constexpr,
):
    """What FlashInfer's step reads: numbers [decode + 2, H], float32, which are a row of time steps for each token, A
    and D; slots [decode], int32 and -1 where there is none; rows [decode, H P + 2 G N] of x, B and C.

    A token without a slot gets zeros in all of them and in its place of the result, so that the step computes zeros
    for it or leaves these as they are.
    """
    token, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_ptr + skip + token)
    held = (slot >= 0) & (slot < slots)
    source = (first + token).to(tl.int64)
    if part == 0:
        head = tl.arange(0, HEADS)
        mask = head < heads
        dt = tl.load(dt_ptr + source * dt_t + head, mask=mask, other=0.0)
        step = time_step(dt, tl.load(bias_ptr + head, mask=mask, other=0.0), low, high)
        tl.store(number_ptr + token * heads + head, tl.where(held, step, 0.0), mask=mask)
        check_slots(word_ptr, True, skip + token, slot, slots)
        tl.store(index_ptr + token, tl.where(held, slot, -1).to(tl.int32))
        if token == 0:
            vectors = number_ptr + tl.num_programs(0) * heads + head
            tl.store(vectors, tl.load(A_ptr + head, mask=mask).to(tl.float32), mask=mask)
            tl.store(vectors + heads, tl.load(D_ptr + head, mask=mask).to(tl.float32), mask=mask)
    groups, inner = heads // RATIO, heads * P
    row = row_ptr + token.to(tl.int64) * (inner + 2 * groups * N)
    copy_row(x_ptr + source * x_t, row, heads, x_h, part, held, P, BLOCK)
    copy_row(B_ptr + source * B_t, row + inner, groups, B_g, part, held, N, BLOCK)
    copy_row(C_ptr + source * C_t, row + inner + groups * N, groups, C_g, part, held, N, BLOCK)
    if not held:
        i = part * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
        tl.store(out_ptr + source * heads * P + i, zeros, mask=i < heads * P)
