"""Write the keys and values of a step's prefill tokens into the cache."""

from shardwise.ops.metadata_reports import LENGTHS, PLACE, check_slots, report
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _check_sequences(
    seq_len_ptr, input_pos_ptr, slot_ptr, word_ptr, tokens, sequences, slots, max_seq, SEQUENCES: tl.constexpr
):
    """Report slots, positions and lengths that the kernels leave out."""
    count = tl.zeros((), tl.int64)
    for base in range(0, sequences, SEQUENCES):
        member = base + tl.arange(0, SEQUENCES)
        exists = member < sequences
        length = tl.load(seq_len_ptr + member, mask=exists, other=0).to(tl.int64)
        past = tl.load(input_pos_ptr + member, mask=exists, other=0).to(tl.int64)
        slot = tl.load(slot_ptr + member, mask=exists, other=-1).to(tl.int64)
        check_slots(word_ptr, exists, member, slot, slots)
        outside = (length < 0) | ((slot >= 0) & ((past < 0) | (past > max_seq - length)))
        report(word_ptr, exists & outside, PLACE, member, past)
        count += tl.sum(length, 0)
    report(word_ptr, count != tokens, LENGTHS, sequences, count)


@triton.jit(do_not_specialize=["tokens", "sequences", "slots", "max_seq"])
def append_kernel(
    k_ptr,  # [T, Nkv, D]
    v_ptr,  # [T, Nkv, Dv]
    k_cache_ptr,
    v_cache_ptr,
    seq_len_ptr,
    input_pos_ptr,
    slot_ptr,
    word_ptr,
    tokens,
    sequences,
    slots,
    max_seq,
    K_STRIDES: tl.constexpr,  # token, head
    V_STRIDES: tl.constexpr,
    K_CACHE: tl.constexpr,  # slot, position, head
    V_CACHE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TOKENS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PDL: tl.constexpr,
):
    """TOKENS tokens of one KV head."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    await_predecessor(PDL)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        _check_sequences(
            seq_len_ptr, input_pos_ptr, slot_ptr, word_ptr, tokens, sequences, slots, max_seq, SEQUENCES
        )  # fmt: skip
    passed = tl.zeros((TOKENS,), tl.int32)
    before = tl.zeros((TOKENS,), tl.int32)
    carry = 0
    for base in range(0, sequences, SEQUENCES):
        member = base + tl.arange(0, SEQUENCES)
        length = tl.load(seq_len_ptr + member, mask=member < sequences, other=0).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), max_seq)
        ends = carry + tl.cumsum(length, 0)
        done = (ends[None, :] <= token[:, None]) & (member < sequences)[None, :]
        passed += tl.sum(done.to(tl.int32), 1)
        before += tl.sum(tl.where(done, length[None, :], 0), 1)
        carry += tl.sum(length, 0)
    known = (token < tokens) & (passed < sequences)
    slot = tl.load(slot_ptr + passed, mask=known, other=-1).to(tl.int64)
    position = tl.load(input_pos_ptr + passed, mask=known, other=-1).to(tl.int64) + token - before
    known = known & (slot >= 0) & (slot < slots) & (position >= 0) & (position < max_seq)
    token = token.to(tl.int64)

    d = tl.arange(0, BLOCK_D)[None, :]
    mask = known[:, None] & (d < D)
    key = tl.load(k_ptr + (token * K_STRIDES[0] + head * K_STRIDES[1])[:, None] + d, mask=mask)
    row = slot * K_CACHE[0] + position * K_CACHE[1] + head * K_CACHE[2]
    tl.store(k_cache_ptr + row[:, None] + d, key.to(k_cache_ptr.dtype.element_ty), mask=mask)

    dv = tl.arange(0, BLOCK_DV)[None, :]
    mask = known[:, None] & (dv < DV)
    value = tl.load(v_ptr + (token * V_STRIDES[0] + head * V_STRIDES[1])[:, None] + dv, mask=mask)
    row = slot * V_CACHE[0] + position * V_CACHE[1] + head * V_CACHE[2]
    tl.store(v_cache_ptr + row[:, None] + dv, value.to(v_cache_ptr.dtype.element_ty), mask=mask)
