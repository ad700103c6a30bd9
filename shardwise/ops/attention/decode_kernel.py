"""The kernel of `decode.py` for any number of sequences; `decode_direct.py` takes over where they are few.

A program takes one KV head of one sequence, with all query heads of its group, and a run of the keys. That of the first
run also norms and rotates the new key, appends it with its value and attends to it. With more than one run each leaves
its sum of values, its top score and its weight in `partial` and counts itself in `counter`; who finds all others there
combines the parts in their order, so that the result does not depend on who came last, and sets the counter to zero.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.triton_support import tl, triton


@triton.jit
def run_of(position, splits, window, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Of `position` cached keys: the first that counts, keys of a split's run, and how many splits have keys; split 0
    also has the new one."""
    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
    old = position - first // BLOCK * BLOCK
    run = tl.maximum(tl.cdiv(tl.cdiv(old, splits), BLOCK) * BLOCK, BLOCK)
    return first, run, tl.maximum(tl.cdiv(old, run), 1)


@triton.jit
def capped(scores, cap):
    """cap * tanh(scores / cap)"""
    return cap - 2.0 * cap / (tl.exp(scores * (2.0 / cap)) + 1.0)


@triton.jit
def _pairs(HALF: tl.constexpr, D: tl.constexpr, PART: tl.constexpr):
    """Half the columns of a head, [HALF], and how far behind each of them its partner in rotation stands.

    PART: how many columns are rotated, where not all are; any two of those behind make a pair.
    """
    one = tl.arange(0, HALF)
    apart = D // 2
    if PART > 0:
        turned = one < PART // 2
        one += tl.where(turned, 0, PART // 2)
        apart = tl.where(turned, PART // 2, D // 2 - PART // 2)
    return one, apart


@triton.jit
def _rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _unit(first, second, first_weight, second_weight, eps, D: tl.constexpr, ON: tl.constexpr):
    """RMS-normalise rows given as two halves of the head; identity when not ON."""
    if ON:
        scale = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)
        first = first * scale[:, None] * first_weight
        second = second * scale[:, None] * second_weight
    return first, second


@triton.jit
def _halves(pointer, row, half, apart, inside, D: tl.constexpr, ON: tl.constexpr):
    """Two halves of a row of a head's size, [1, HALF] float32; ones when not ON."""
    first = 1.0
    second = 1.0
    if ON:
        at = pointer + row.to(tl.int64) * D + half
        first = tl.load(at, mask=inside, other=0.0)[None, :].to(tl.float32)
        second = tl.load(at + apart, mask=inside, other=0.0)[None, :].to(tl.float32)
    return first, second


@triton.jit
def _cached(k_cache_ptr, v_cache_ptr, rows, half, apart, whole, seen, D: tl.constexpr, PART: tl.constexpr):
    """The two halves of keys [HALF, keys] and the values [keys, D] at `rows` of the cache."""
    if PART > 0:
        apart = apart[:, None]
    k_mask = seen[None, :]
    v_mask = seen[:, None]
    if whole.shape[0] > D:
        k_mask &= tl.arange(0, whole.shape[0] // 2)[:, None] < D // 2
        v_mask &= whole[None, :] < D
    k1 = tl.load(k_cache_ptr + rows[None, :] + half[:, None], mask=k_mask, other=0.0)
    k2 = tl.load(k_cache_ptr + rows[None, :] + apart + half[:, None], mask=k_mask, other=0.0)
    v = tl.load(v_cache_ptr + rows[:, None] + whole[None, :], mask=v_mask, other=0.0)
    return k1, k2, v


@triton.jit
def _attend(q1, q2, k1, k2, v, seen, top, weight, total, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """The softmax so far, and that of some keys more."""
    scores = tl.dot(q1, k1, input_precision=PRECISION) + tl.dot(q2, k2, input_precision=PRECISION)
    if CAPPED:
        scores = capped(scores, cap)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    decay = tl.where(top == float("-inf"), 0.0, tl.exp(top - new_top))
    p = tl.where(seen[None, :], tl.exp(scores - tl.where(new_top == float("-inf"), 0.0, new_top)[:, None]), 0.0)
    total = total * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return new_top, weight * decay + tl.sum(p, 1), total


@triton.jit(do_not_specialize=["splits", "scale", "eps"])
def decode_kernel(
    qkv_ptr,  # [B, (N + 2 Nkv) D], strided
    k_cache_ptr,  # [pages, PAGE, Nkv, D], strided
    v_cache_ptr,  # the same, with the same strides
    table_ptr,  # int32 [rows, max_pages]
    slot_ptr,  # int32 [B], each sequence's row of the table
    position_ptr,  # int32 [B], keys already cached; negative: the row is padding
    rope_ptr,  # float32 [max_position, D]: cos of the pairs, then sin; only with ROTATED
    q_norm_ptr,  # [D]
    k_norm_ptr,  # [D]
    sinks_ptr,  # [N]
    out_ptr,  # [B, N D]
    partial_ptr,  # float32 [B Nkv, splits, GROUP_PAD, 2 HALF + 2]
    counter_ptr,  # int32 [B Nkv], zero between calls
    kv_heads,
    max_pages,
    splits,
    row_stride,
    page_stride,
    token_stride,
    head_stride,
    scale,
    cap,
    eps,
    window,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    QK_NORM: tl.constexpr,
    SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """
    HALF      of a head's columns D, or the next power of two
    ROTATED   how many columns of a head are rotated, from the first on
    QK_NORM   heads are normed: 0 not, 1 before their rotation, 2 after it
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    sequence = pair // kv_heads
    head = pair % kv_heads
    WIDTH: tl.constexpr = 2 * HALF
    PRECISION: tl.constexpr = "ieee" if qkv_ptr.dtype.element_ty == tl.float32 else "tf32"
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # What stays during the whole step loads while the kernel before drains.
    position = tl.load(position_ptr + sequence)
    slot = tl.load(slot_ptr + sequence) if SLOTS else sequence
    table = table_ptr + slot * max_pages
    PART: tl.constexpr = ROTATED if ROTATED < D else 0
    half, apart = _pairs(HALF, D, PART)
    whole = tl.arange(0, WIDTH)
    in_half = True  # columns of half a head, of a whole one
    in_whole = True
    if WIDTH > D:
        in_half = tl.arange(0, HALF) < D // 2
        in_whole = whole < D
    group = tl.arange(0, GROUP_PAD)
    live = group < GROUP
    row = qkv_ptr + sequence.to(tl.int64) * row_stride
    if position < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        if split == 0:
            place = (sequence.to(tl.int64) * kv_heads + head) * GROUP * D + group[:, None] * D + whole[None, :]
            tl.store(
                out_ptr + place, tl.zeros([GROUP_PAD, WIDTH], out_ptr.dtype.element_ty), mask=live[:, None] & in_whole
            )
        return

    first, run, active = run_of(position, splits, window, BLOCK, WINDOW)
    if split >= active:
        return
    begin = first // BLOCK * BLOCK + split * run
    end = tl.minimum(begin + run, position)
    cos, sin = _halves(rope_ptr, position, tl.arange(0, HALF), D // 2, in_half, D, ROTATED > 0)
    q_weight1, q_weight2 = _halves(q_norm_ptr, position * 0, half, apart, in_half, D, QK_NORM > 0)
    k_weight1, k_weight2 = _halves(k_norm_ptr, position * 0, half, apart, in_half, D, QK_NORM > 0)
    if SINKS:
        sink = tl.load(sinks_ptr + head * GROUP + group, mask=live, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    q_at = row + (head * GROUP + group[:, None]) * D + half[None, :]
    k_at = row + (kv_heads * GROUP + head) * D + half[None, :]
    own = split == 0  # it also rotates, stores and attends to this token's own key and value
    q1 = tl.load(q_at, mask=live[:, None] & in_half, other=0.0).to(tl.float32)
    q2 = tl.load(q_at + apart, mask=live[:, None] & in_half, other=0.0).to(tl.float32)
    own_k1 = tl.load(k_at, mask=own & in_half, other=0.0).to(tl.float32)
    own_k2 = tl.load(k_at + apart, mask=own & in_half, other=0.0).to(tl.float32)
    own_v = tl.load(row + (kv_heads * (GROUP + 1) + head) * D + whole, mask=own & in_whole, other=0.0)
    own_page = tl.load(table + position // PAGE, mask=own, other=0, cache_modifier=".cg").to(tl.int64)  # may be new
    q1, q2 = _unit(q1, q2, q_weight1, q_weight2, eps, D, QK_NORM == 1)
    if ROTATED > 0:
        q1, q2 = _rotate(q1, q2, cos, sin)
    q1, q2 = _unit(q1, q2, q_weight1, q_weight2, eps, D, QK_NORM == 2)
    q1 = (q1 * scale).to(qkv_ptr.dtype.element_ty)
    q2 = (q2 * scale).to(qkv_ptr.dtype.element_ty)

    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_PAD], tl.float32)
    total = tl.zeros([GROUP_PAD, WIDTH], tl.float32)
    if own:
        own_k1, own_k2 = _unit(own_k1, own_k2, k_weight1, k_weight2, eps, D, QK_NORM == 1)
        if ROTATED > 0:
            own_k1, own_k2 = _rotate(own_k1, own_k2, cos, sin)
        own_k1, own_k2 = _unit(own_k1, own_k2, k_weight1, k_weight2, eps, D, QK_NORM == 2)
        k1 = own_k1.to(k_cache_ptr.dtype.element_ty)
        k2 = own_k2.to(k_cache_ptr.dtype.element_ty)
        place = own_page * page_stride + position % PAGE * token_stride + head * head_stride
        tl.store(k_cache_ptr + place + half[None, :], k1, mask=in_half)
        tl.store(k_cache_ptr + place + apart + half[None, :], k2, mask=in_half)
        tl.store(v_cache_ptr + place + whole, own_v.to(v_cache_ptr.dtype.element_ty), mask=in_whole)
        top = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1) + tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)
        if CAPPED:
            top = capped(top, cap)
        weight += 1.0
        total += own_v.to(tl.float32)[None, :]

    keys = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + keys
        seen = (at < position) & (at >= first)
        page = tl.load(table + start // PAGE).to(tl.int64)
        slots = page * page_stride + (start % PAGE + keys).to(tl.int64) * token_stride + head * head_stride
        keys1, keys2, values = _cached(k_cache_ptr, v_cache_ptr, slots, half, apart, whole, seen, D, PART)
        top, weight, total = _attend(
            q1, q2, keys1, keys2, values, seen, top, weight, total, cap, CAPPED, PRECISION
        )  # fmt: skip

    if active > 1:
        stride: tl.constexpr = GROUP_PAD * (WIDTH + 2)
        parts = partial_ptr + pair.to(tl.int64) * splits * stride
        mine = parts + split * stride
        tl.store(mine + group[:, None] * WIDTH + whole[None, :], total, mask=live[:, None])
        tl.store(mine + GROUP_PAD * WIDTH + group, top, mask=live)
        tl.store(mine + GROUP_PAD * WIDTH + GROUP_PAD + group, weight, mask=live)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if arrived != active - 1:
            return
        tl.store(counter_ptr + pair, 0)
        top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        weight = tl.zeros([GROUP_PAD], tl.float32)
        total = tl.zeros([GROUP_PAD, WIDTH], tl.float32)
        for base in range(0, active, 4):  # the loads of four parts are on the way at once
            totals = ()
            tops = ()
            weights = ()
            for number in tl.static_range(4):
                theirs = parts + (base + number) * stride
                there = live & (base + number < active)
                total_at = theirs + group[:, None] * WIDTH + whole[None, :]
                totals = totals + (tl.load(total_at, mask=there[:, None], other=0.0, cache_modifier=".cg"),)
                top_at = theirs + GROUP_PAD * WIDTH + group
                tops = tops + (tl.load(top_at, mask=there, other=float("-inf"), cache_modifier=".cg"),)
                weights = weights + (tl.load(top_at + GROUP_PAD, mask=there, other=0.0, cache_modifier=".cg"),)
            for number in tl.static_range(4):
                new_top = tl.where(live, tl.maximum(top, tops[number]), 0.0)
                before = tl.exp(top - new_top)
                factor = tl.exp(tops[number] - new_top)
                total = total * before[:, None] + totals[number] * factor[:, None]
                weight = weight * before + weights[number] * factor
                top = new_top
        weight = tl.where(live, weight, 1.0)
    if SINKS:
        weight += tl.exp(sink - top)
    place = (sequence.to(tl.int64) * kv_heads + head) * GROUP * D + group[:, None] * D + whole[None, :]
    result = total / weight[:, None]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=live[:, None] & in_whole)
