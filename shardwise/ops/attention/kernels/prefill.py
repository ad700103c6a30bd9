"""Many new tokens a sequence, sequences of any length behind one another, keys and values already in the cache.

The rows of a tile are (token, query head of the group) pairs of one KV head, so short sequences of grouped heads
still fill it. The host knows only the number of sequences and tokens: it launches enough tiles for any lengths, and
each program finds its sequence. Tiles run from last to first, since the later ones see more keys.
"""

from shardwise.ops.attention.kernels.cap import capped
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _locate(seq_len_ptr, sequences, max_seq, tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, SEQUENCES: tl.constexpr):
    """The sequence of a tile (`sequences` when there is none), the tile's number in it, its first flat token."""
    passed = 0
    tiles_before = 0
    tokens_before = 0
    carry = 0
    for base in range(0, sequences, SEQUENCES):
        member = base + tl.arange(0, SEQUENCES)
        length = tl.load(seq_len_ptr + member, mask=member < sequences, other=0).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), max_seq)
        tiles = tl.cdiv(length * GROUP, BLOCK_M)
        ends = carry + tl.cumsum(tiles, 0)
        done = (ends <= tile) & (member < sequences)
        passed += tl.sum(done.to(tl.int32), 0)
        tiles_before += tl.sum(tl.where(done, tiles, 0), 0)
        tokens_before += tl.sum(tl.where(done, length, 0), 0)
        carry += tl.sum(tiles, 0)
    return passed, tile - tiles_before, tokens_before


@triton.jit
def _attend(
    acc,
    highest,
    total,
    q,
    k_base,
    v_base,
    position,  # int32 [BLOCK_M], -1 for a row without a query
    begin,
    stop,
    scale,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the keys [begin, stop) in; without MASKED every query sees all of them, and they are whole blocks."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    k_tile = k_base + begin.to(tl.int64) * K_STRIDE + n[:, None] * K_STRIDE + d[None, :]
    v_tile = v_base + begin.to(tl.int64) * V_STRIDE + n[:, None] * V_STRIDE + dv[None, :]
    left = 1.0 if CAP > 0 else scale  # what scores are still to be multiplied with
    for start in range(begin, stop, BLOCK_N):
        if MASKED:
            present = start + n < stop
            k = tl.load(k_tile, mask=present[:, None] & (d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_tile)
        else:
            k = tl.load(k_tile, mask=(d < D)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if CAP > 0:
            scores = capped(scores, scale, CAP)
        if MASKED:
            distance = position[:, None] - (start + n)[None, :]
            seen = (distance >= 0) & (distance < WINDOW) if WINDOW > 0 else distance >= 0
            scores = tl.where(seen, scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1) * left)
        shift = tl.where(risen == float("-inf"), 0.0, risen) if MASKED else risen
        weights = tl.exp2(scores * left - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, 1)
        if MASKED:
            v = tl.load(v_tile, mask=present[:, None] & (dv < DV)[None, :], other=0.0)
        elif DV == BLOCK_DV:
            v = tl.load(v_tile)
        else:
            v = tl.load(v_tile, mask=(dv < DV)[None, :], other=0.0)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
        highest = risen
        k_tile += BLOCK_N * K_STRIDE
        v_tile += BLOCK_N * V_STRIDE
    return acc, highest, total


@triton.jit(do_not_specialize=["scale", "tiles", "tokens", "sequences", "slots", "max_seq"])
def prefill_kernel(
    q_ptr,  # [T, N, D]
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,  # [T, N, Dv]
    seq_len_ptr,
    input_pos_ptr,
    slot_ptr,
    sinks_ptr,
    scale,
    tiles,
    tokens,
    sequences,
    slots,
    max_seq,
    Q_STRIDES: tl.constexpr,  # token, head
    K_CACHE: tl.constexpr,  # slot, position, head
    V_CACHE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEQUENCES: tl.constexpr,
    CAP: tl.constexpr,  # scores become CAP tanh(score / CAP); 0: they do not
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV_HEADS
    await_predecessor(PDL)
    sequence, tile, first_token = _locate(
        seq_len_ptr, sequences, max_seq, tiles - 1 - tl.program_id(0) // KV_HEADS, GROUP, BLOCK_M, SEQUENCES
    )
    if sequence < sequences:
        length = tl.minimum(tl.load(seq_len_ptr + sequence).to(tl.int32), max_seq)
        past = tl.load(input_pos_ptr + sequence).to(tl.int32)
        slot = tl.load(slot_ptr + sequence).to(tl.int64)
        live = (slot >= 0) & (slot < slots) & (past >= 0) & (past <= max_seq - length)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token = row // GROUP
        head = kv_head * GROUP + row % GROUP
        valid = (token < length) & (first_token + token < tokens)
        flat = (first_token + token).to(tl.int64)
        d = tl.arange(0, BLOCK_D)[None, :]
        query = q_ptr + (flat * Q_STRIDES[0] + head * Q_STRIDES[1])[:, None] + d
        q = tl.load(query, mask=valid[:, None] & (d < D), other=0.0)
        position = tl.where(valid, past + token, -1)
        first = past + tile * BLOCK_M // GROUP
        last = past + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, length - 1)
        stop = tl.where(live, last + 1, 0)
        if WINDOW > 0:
            middle = tl.minimum(tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N, stop)
        else:  # keys below `middle` are seen by every query of the tile
            middle = tl.where(live, (first + 1) // BLOCK_N * BLOCK_N, 0)
        # A dead sequence has no keys; its base stays inside the cache.
        slot = tl.where(live, slot, 0)
        k_base = k_cache_ptr + slot * K_CACHE[0] + kv_head.to(tl.int64) * K_CACHE[2]
        v_base = v_cache_ptr + slot * V_CACHE[0] + kv_head.to(tl.int64) * V_CACHE[2]
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        if WINDOW == 0:
            acc, highest, total = _attend(
                acc, highest, total, q, k_base, v_base, position, stop * 0, middle, scale,
                K_CACHE[1], V_CACHE[1], D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CAP, WINDOW, False,
            )  # fmt: skip
        acc, highest, total = _attend(
            acc, highest, total, q, k_base, v_base, position, middle, stop, scale,
            K_CACHE[1], V_CACHE[1], D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CAP, WINDOW, True,
        )  # fmt: skip
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
            total += tl.exp2(sink - tl.where(total > 0.0, highest, sink))
        dv = tl.arange(0, BLOCK_DV)[None, :]
        out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        target = out_ptr + (flat * (KV_HEADS * GROUP) + head)[:, None] * DV + dv
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (dv < DV))
