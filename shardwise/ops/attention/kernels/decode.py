"""One new token a sequence: flash-decoding over splits of the cached keys, then their reduction.

A program owns one KV head of one split and packs the head's whole query group into the rows of its tile, so every
key and value is read once. Splits divide the length that the sequence has on the device, not the cache's capacity;
their number comes from the host, from the batch alone. The split that owns the new position also appends it.
"""

from shardwise.ops.attention.kernels.cap import capped
from shardwise.ops.metadata_reports import PLACE, check_slots, report
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _split_length(visible, splits, BLOCK_N: tl.constexpr):
    """Keys of a split: the same whole number of blocks for each, the last one may hold fewer."""
    return tl.cdiv(tl.cdiv(visible, splits), BLOCK_N) * BLOCK_N


@triton.jit(do_not_specialize=["scale", "first_sequence", "first_token", "slots", "max_seq", "rows", "splits"])
def flattened_decode_kernel(
    q_ptr,  # [T, N, D]
    k_ptr,  # [T, Nkv, D]
    v_ptr,  # [T, Nkv, Dv]
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,  # [T, N, Dv], written when SPLIT is off
    partial_ptr,  # float32 [rows, Dv] results of the splits, then [rows] their log2 sums
    input_pos_ptr,
    slot_ptr,
    sinks_ptr,
    word_ptr,
    scale,
    first_sequence,
    first_token,
    slots,
    max_seq,
    rows,
    splits,
    Q_STRIDES: tl.constexpr,  # token, head
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
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
    SPLIT: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    # KV heads run fastest: programs that start together read neighbouring memory.
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split = tl.program_id(0) // KV_HEADS % splits
    index = tl.program_id(0) // (KV_HEADS * splits)
    group = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    in_group = group < GROUP
    token = (first_token + index).to(tl.int64)
    await_predecessor(PDL)
    position = tl.load(input_pos_ptr + first_sequence + index).to(tl.int32)
    slot = tl.load(slot_ptr + first_sequence + index).to(tl.int64)
    live = (slot >= 0) & (slot < slots) & (position >= 0) & (position < max_seq)
    if not live:
        check_slots(word_ptr, True, first_sequence + index, slot, slots)
        report(word_ptr, (slot >= 0) & (slot < slots), PLACE, first_sequence + index, position)
    lowest = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    length = _split_length(position + 1 - lowest, splits, BLOCK_N)
    begin = lowest + split * length
    if live & (begin <= position):
        query_row = q_ptr + token * Q_STRIDES[0] + (head * GROUP + group)[:, None] * Q_STRIDES[1]
        q = tl.load(query_row + d[None, :], mask=in_group[:, None] & (d < D)[None, :], other=0.0)
        stop = tl.minimum(begin + length, position)  # the new token is not in the cache yet
        k_base = k_cache_ptr + slot * K_CACHE[0] + begin.to(tl.int64) * K_CACHE[1] + head * K_CACHE[2]
        v_base = v_cache_ptr + slot * V_CACHE[0] + begin.to(tl.int64) * V_CACHE[1] + head * V_CACHE[2]
        n = tl.arange(0, BLOCK_N)
        k_tile = k_base + n[:, None] * K_CACHE[1] + d[None, :]
        v_tile = v_base + n[:, None] * V_CACHE[1] + dv[None, :]
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        for start in range(begin, stop, BLOCK_N):
            seen = start + n < stop
            k = tl.load(k_tile, mask=seen[:, None] & (d < D)[None, :], other=0.0).to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = capped(scores, scale, CAP) if CAP > 0 else scores * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            risen = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - risen[:, None])
            decay = tl.exp2(highest - risen)
            total = total * decay + tl.sum(weights, 1)
            v = tl.load(v_tile, mask=seen[:, None] & (dv < DV)[None, :], other=0.0).to(q.dtype)
            acc = tl.dot(weights.to(q.dtype), v, acc * decay[:, None], input_precision="ieee")
            highest = risen
            k_tile += BLOCK_N * K_CACHE[1]
            v_tile += BLOCK_N * V_CACHE[1]
        if begin + length > position:
            key = tl.load(k_ptr + token * K_STRIDES[0] + head * K_STRIDES[1] + d, mask=d < D, other=0.0)
            value = tl.load(v_ptr + token * V_STRIDES[0] + head * V_STRIDES[1] + dv, mask=dv < DV, other=0.0)
            key = key.to(k_cache_ptr.dtype.element_ty)
            value = value.to(v_cache_ptr.dtype.element_ty)
            k_row = slot * K_CACHE[0] + position.to(tl.int64) * K_CACHE[1] + head * K_CACHE[2]
            v_row = slot * V_CACHE[0] + position.to(tl.int64) * V_CACHE[1] + head * V_CACHE[2]
            tl.store(k_cache_ptr + k_row + d, key, mask=d < D)
            tl.store(v_cache_ptr + v_row + dv, value, mask=dv < DV)
            score = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1)
            score = capped(score, scale, CAP) if CAP > 0 else score * scale
            risen = tl.maximum(highest, score)
            weight = tl.exp2(score - risen)
            decay = tl.exp2(highest - risen)
            total = total * decay + weight
            acc = acc * decay[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
            highest = risen
        query_head = head * GROUP + group
        stored = in_group[:, None] & (dv < DV)[None, :]
        if not SPLIT:
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + query_head, mask=in_group, other=0.0).to(tl.float32)
                total += tl.exp2(sink * 1.4426950408889634 - highest)
            target = out_ptr + (token * KV_HEADS * GROUP + query_head)[:, None] * DV + dv[None, :]
            tl.store(target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=stored)
        else:
            row = (index.to(tl.int64) * KV_HEADS * GROUP + query_head) * splits + split
            tl.store(partial_ptr + row[:, None] * DV + dv[None, :], acc / total[:, None], mask=stored)
            sums = partial_ptr + rows.to(tl.int64) * DV
            tl.store(sums + row, highest + tl.log2(total), mask=in_group)
    elif not SPLIT:
        target = out_ptr + (token * KV_HEADS * GROUP + head * GROUP + group)[:, None] * DV + dv[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_DV), out_ptr.dtype.element_ty)
        tl.store(target, zeros, mask=in_group[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["first_sequence", "first_token", "slots", "max_seq", "rows", "splits"])
def reduce_kernel(
    partial_ptr,
    out_ptr,
    input_pos_ptr,
    slot_ptr,
    sinks_ptr,
    first_sequence,
    first_token,
    slots,
    max_seq,
    rows,
    splits,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Join the splits of one query head; splits without keys wrote nothing and are not read."""
    head = tl.program_id(0) % HEADS
    index = tl.program_id(0) // HEADS
    split = tl.arange(0, BLOCK_SPLITS)
    dv = tl.arange(0, BLOCK_DV)
    await_predecessor(PDL)
    position = tl.load(input_pos_ptr + first_sequence + index).to(tl.int32)
    slot = tl.load(slot_ptr + first_sequence + index).to(tl.int64)
    live = (slot >= 0) & (slot < slots) & (position >= 0) & (position < max_seq)
    visible = tl.minimum(position + 1, WINDOW) if WINDOW > 0 else position + 1
    used = (split < tl.cdiv(visible, tl.maximum(_split_length(visible, splits, BLOCK_N), 1))) & live
    row = tl.program_id(0).to(tl.int64) * splits + split
    sums = tl.load(partial_ptr + rows.to(tl.int64) * DV + row, mask=used, other=float("-inf"))
    highest = tl.max(sums, 0)
    weights = tl.where(used, tl.exp2(sums - highest), 0.0)
    total = tl.sum(weights, 0)
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634 - highest)
    mask = used[:, None] & (dv < DV)[None, :]
    parts = tl.load(partial_ptr + row[:, None] * DV + dv[None, :], mask=mask, other=0.0)
    out = tl.where(live, tl.sum(parts * weights[:, None], 0) / total, 0.0)
    target = ((first_token + index).to(tl.int64) * HEADS + head) * DV + dv
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=dv < DV)
