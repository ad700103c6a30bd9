"""The kernel of `decode.py` for few sequences: keys and values straight from memory to registers.

With few sequences a program has a block of keys or two, and what takes time is one trip to memory behind the other.
Here a program asks for its first keys and values while the kernel before still runs, holds them in registers, and
needs shared memory for sums over its warps alone. Scores and sums are multiply-adds.

Tensors are [G heads, ROWS of keys, D]: a thread has eight columns of one row for all heads of a group. Each row keeps a
softmax of its own until the program's last key.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.attention.decode_kernel import capped, run_of
from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.triton_support import tl

LOWEST = tl.constexpr(-3.0e38)  # of a softmax without keys: finite, so that differences are numbers


@jit
def _line(pointer, columns, ON: tl.constexpr):
    """Columns of one row as [1, D] float32; one when not ON."""
    line = 1.0
    if ON:
        line = gl.load(pointer + columns).to(gl.float32)
    return line


@jit
def _turned(x_ptr, at, partner_at, here, cos, sin, weight, partner_weight, eps, D: tl.constexpr, NORM: tl.constexpr,
            ROTATED: tl.constexpr):  # fmt: skip
    """Heads [n, D], normed and rotated, float32; NORM 2: normed last. Rotation takes each column's partner."""
    x = gl.load(x_ptr + at, mask=here, other=0.0).to(gl.float32)
    partner = x
    if ROTATED > 0:
        partner = gl.load(x_ptr + partner_at, mask=here, other=0.0).to(gl.float32)
    if NORM == 1:
        scale = gl.expand_dims(gl.rsqrt(gl.sum(x * x, 1) / D + eps), 1)
        x = x * scale * weight
        partner = partner * scale * partner_weight
    if ROTATED > 0:
        x = x * cos + partner * sin
    if NORM == 2:
        x = x * gl.expand_dims(gl.rsqrt(gl.sum(x * x, 1) / D + eps), 1) * weight
    return x


@jit
def _angles(rope_ptr, d, position, D: tl.constexpr, ROTATED: tl.constexpr):
    """Of columns [1, D]: their partners in rotation, cos, and sin with the partner's sign."""
    PART: tl.constexpr = ROTATED > 0 and ROTATED < D
    HALF: tl.constexpr = ROTATED // 2 if PART else D // 2
    partner = (d + HALF) % (2 * HALF)
    pair = d % HALF
    if PART:
        partner = gl.where(d < ROTATED, partner, d)
        pair = gl.where(d < ROTATED, pair, HALF)  # the first of those that do not turn
    angle = position * D + pair
    cos = _line(rope_ptr, angle, ROTATED > 0)
    sin = gl.where(d < HALF, -1.0, 1.0) * _line(rope_ptr, angle + D // 2, ROTATED > 0)
    return partner, cos, sin


@jit
def _load_block(
    k_cache_ptr, v_cache_ptr, table, start, first, end, row, column, page_stride, token_stride, offset,
    PAGE: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys and values [ROWS, D] of a block, in REP turns, and which rows count."""
    page = gl.load(table + start // PAGE, mask=start < end, other=0).to(gl.int64)
    base = page * page_stride + offset
    keys = ()
    values = ()
    counts = ()
    for turn in gl.static_range(REP):
        key = turn * ROWS + row
        counts = counts + ((start + key >= first) & (start + key < end),)
        at = gl.expand_dims(base + (start % PAGE + key).to(gl.int64) * token_stride, 1) + gl.expand_dims(column, 0)
        keys = keys + (gl.load(k_cache_ptr + at, mask=gl.expand_dims(counts[turn], 1), other=0.0),)
        values = values + (gl.load(v_cache_ptr + at, mask=gl.expand_dims(counts[turn], 1), other=0.0),)
    return keys, values, counts


@jit
def _attend(q, keys, values, counts, top, weight, total, cap, REP: tl.constexpr, CAPPED: tl.constexpr,
            SUMS: tl.constexpr):  # fmt: skip
    """The rows' softmaxes so far, and those of a block more. q [G, 1, D]; top and weight [G, ROWS]."""
    scores = ()
    new_top = top
    for turn in gl.static_range(REP):
        seen = gl.expand_dims(gl.convert_layout(counts[turn], gl.SliceLayout(0, SUMS)), 0)
        score = gl.sum(q * gl.expand_dims(keys[turn].to(gl.float32), 0), 2)
        if CAPPED:
            score = capped(score, cap)
        score = gl.where(seen, score, float("-inf"))
        scores = scores + (score,)
        new_top = gl.maximum(new_top, score)
    decay = gl.exp(top - new_top)
    weight *= decay
    total *= gl.expand_dims(decay, 2)
    for turn in gl.static_range(REP):
        p = gl.exp(scores[turn] - new_top)
        weight += p
        total += gl.expand_dims(p, 2) * gl.expand_dims(values[turn].to(gl.float32), 0)
    return new_top, weight, total


@jit
def _over_rows(top, weight, total, TURNED: tl.constexpr, SIDE: tl.constexpr):
    """The rows' softmaxes as one: mean [G, D], and the logarithm of its weight [G]."""
    top = gl.convert_layout(top, gl.SliceLayout(2, TURNED))
    weight = gl.convert_layout(weight, gl.SliceLayout(2, TURNED))
    total = gl.convert_layout(total, TURNED)
    best = gl.max(top, 1)
    factor = gl.exp(top - gl.expand_dims(best, 1))
    weight = gl.convert_layout(gl.sum(weight * factor, 1), SIDE)
    mean = gl.sum(total * gl.expand_dims(factor, 2), 1) / gl.expand_dims(weight, 1)
    return mean, gl.convert_layout(best, SIDE) + gl.log(weight)


@jit
def _merge(parts, active, place, lane, live, G: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
           SIDE: tl.constexpr, OUT: tl.constexpr, MERGE: tl.constexpr):  # fmt: skip
    """The mean of all parts by their weights, in their order, and the logarithm of its weight.

    The loads of MERGE parts are on the way at once.
    """
    top = gl.zeros([G], gl.float32, SIDE) + LOWEST
    weight = gl.zeros([G], gl.float32, SIDE)
    mean = gl.zeros([G, D], gl.float32, OUT)
    for base in range(0, active, MERGE):
        means = ()
        logs = ()
        for number in gl.static_range(MERGE):
            theirs = parts + (base + number) * STRIDE
            there = live & (base + number < active)
            means = means + (gl.load(theirs + place, mask=gl.expand_dims(there, 1), other=0.0, cache_modifier=".cg"),)
            logs = logs + (gl.load(theirs + G * D + lane, mask=there, other=LOWEST, cache_modifier=".cg"),)
        for number in gl.static_range(MERGE):
            new_top = gl.maximum(top, logs[number])
            before = gl.exp(top - new_top)
            factor = gl.exp(logs[number] - new_top)
            mean = mean * gl.expand_dims(before, 1) + means[number] * gl.expand_dims(factor, 1)
            weight = weight * before + factor
            top = new_top
    return mean / gl.expand_dims(weight, 1), top + gl.log(weight)


@jit(do_not_specialize=["splits", "scale", "eps"])
def direct_kernel(
    qkv_ptr, k_cache_ptr, v_cache_ptr, table_ptr, slot_ptr, position_ptr, rope_ptr, q_norm_ptr, k_norm_ptr, sinks_ptr,
    out_ptr, partial_ptr, counter_ptr, kv_heads, max_pages, splits, row_stride, page_stride, token_stride, head_stride,
    scale, cap, eps, window,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, REP: tl.constexpr, WARPS: tl.constexpr,
    ROTATED: tl.constexpr, QK_NORM: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
    SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Arguments as those of `decode_kernel`; G: GROUP or the next power of two; a block is REP turns of ROWS keys."""
    ROWS: tl.constexpr = WARPS * 256 // D
    BLOCK: tl.constexpr = ROWS * REP
    STRIDE: tl.constexpr = G * (D + 1)
    ALL: tl.constexpr = gl.BlockedLayout([G, 1, 8], [1, 256 // D, D // 8], [1, WARPS, 1], [2, 1, 0])
    TILE: tl.constexpr = gl.SliceLayout(0, ALL)
    HEADS: tl.constexpr = gl.SliceLayout(1, ALL)
    SUMS: tl.constexpr = gl.SliceLayout(2, ALL)
    # Where a thread has all rows of its heads and columns: sums over rows need no other thread.
    WIDE: tl.constexpr = min(max(G * D // (32 * WARPS), 1), 4)
    LANES: tl.constexpr = min(32, D // WIDE)
    TURNED: tl.constexpr = gl.BlockedLayout([1, ROWS, WIDE], [32 // LANES, 1, LANES], [WARPS, 1, 1], [2, 1, 0])
    OUT: tl.constexpr = gl.SliceLayout(1, TURNED)
    SIDE: tl.constexpr = gl.SliceLayout(1, OUT)
    pair = gl.program_id(0)
    split = gl.program_id(1)
    sequence = pair // kv_heads
    head = pair % kv_heads
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    position = gl.load(position_ptr + sequence)
    slot = gl.load(slot_ptr + sequence) if SLOTS else sequence
    table = table_ptr + slot * max_pages
    lane = gl.arange(0, G, layout=SIDE)
    live = lane < GROUP
    place = gl.expand_dims(lane * D, 1) + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, OUT)), 0)
    out = out_ptr + (sequence.to(gl.int64) * kv_heads + head) * GROUP * D
    first, run, active = run_of(position, splits, window, BLOCK, WINDOW)
    if (position < 0) & (split == 0):
        if PDL:
            tl.extra.cuda.gdc_wait()
        gl.store(out + place, gl.zeros([G, D], out_ptr.dtype.element_ty, OUT), mask=gl.expand_dims(live, 1))
    if (position >= 0) & (split < active):
        begin = first // BLOCK * BLOCK + split * run
        end = gl.minimum(begin + run, position)
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE))
        column = gl.arange(0, D, layout=gl.SliceLayout(0, TILE))
        offset = head * head_stride
        keys, values, counts = _load_block(
            k_cache_ptr, v_cache_ptr, table, begin, first, end, row, column, page_stride, token_stride, offset,
            PAGE, REP, ROWS,
        )  # fmt: skip
        own = split == 0  # it also rotates, stores and attends to this token's own key and value
        own_page = gl.load(table + position // PAGE, mask=own, other=0, cache_modifier=".cg").to(gl.int64)
        d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, HEADS)), 0)
        partner, cos, sin = _angles(rope_ptr, d, position, D, ROTATED)
        q_weight = _line(q_norm_ptr, d, QK_NORM > 0)
        q_partner = _line(q_norm_ptr, partner, QK_NORM == 1)
        k_weight = _line(k_norm_ptr, d, QK_NORM > 0)
        k_partner = _line(k_norm_ptr, partner, QK_NORM == 1)
        if SINKS:
            sink = gl.load(sinks_ptr + head * GROUP + lane, mask=live, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        qkv = qkv_ptr + sequence.to(gl.int64) * row_stride
        g = gl.expand_dims(gl.arange(0, G, layout=gl.SliceLayout(1, HEADS)), 1)
        q_ptr = qkv + head * GROUP * D
        k_ptr = qkv + (kv_heads * GROUP + head) * D
        mine = (d >= 0) & own
        own_v = gl.load(k_ptr + kv_heads * D + d, mask=mine, other=0.0)
        q = _turned(
            q_ptr, g * D + d, g * D + partner, (d >= 0) & (g < GROUP), cos, sin, q_weight, q_partner, eps, D, QK_NORM,
            ROTATED,
        )  # fmt: skip
        own_k = _turned(k_ptr, d, partner, mine, cos, sin, k_weight, k_partner, eps, D, QK_NORM, ROTATED)
        own_k = own_k.to(k_cache_ptr.dtype.element_ty)
        own_v = own_v.to(v_cache_ptr.dtype.element_ty)
        at = own_page * page_stride + position % PAGE * token_stride + offset
        gl.store(k_cache_ptr + at + d, own_k, mask=mine)
        gl.store(v_cache_ptr + at + d, own_v, mask=mine)
        q = q * scale
        own_score = gl.sum(q * own_k.to(gl.float32), 1)
        if CAPPED:
            own_score = capped(own_score, cap)
        own_score = gl.convert_layout(own_score, gl.SliceLayout(1, SUMS))
        q = gl.expand_dims(q, 1)
        holds = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, SUMS)), 0) == gl.where(own, 0, ROWS)
        top = gl.where(holds, gl.expand_dims(own_score, 1), LOWEST)
        weight = gl.where(top > LOWEST, 1.0, 0.0)
        total = gl.expand_dims(weight, 2) * gl.expand_dims(own_v.to(gl.float32), 1)
        top, weight, total = _attend(q, keys, values, counts, top, weight, total, cap, REP, CAPPED, SUMS)
        for start in range(begin + BLOCK, end, BLOCK):
            keys, values, counts = _load_block(
                k_cache_ptr, v_cache_ptr, table, start, first, end, row, column, page_stride, token_stride, offset,
                PAGE, REP, ROWS,
            )  # fmt: skip
            top, weight, total = _attend(q, keys, values, counts, top, weight, total, cap, REP, CAPPED, SUMS)
        mean, log = _over_rows(top, weight, total, TURNED, SIDE)
        last = active == 1
        if active > 1:
            parts = partial_ptr + pair.to(gl.int64) * splits * STRIDE
            gl.store(parts + split * STRIDE + place, mean, mask=gl.expand_dims(live, 1))
            gl.store(parts + split * STRIDE + G * D + lane, log, mask=live)
            tl.debug_barrier()  # all of this program's stores come before its arrival
            last = gl.atomic_add(counter_ptr + pair, 1, sem="acq_rel", scope="gpu") == active - 1
            if last:
                gl.store(counter_ptr + pair, 0)
                mean, log = _merge(parts, active, place, lane, live, G, D, STRIDE, SIDE, OUT, 16)
        if last:
            if SINKS:
                mean = mean / gl.expand_dims(1.0 + gl.exp(sink.to(gl.float32) - log), 1)
            gl.store(out + place, mean.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(live, 1))
