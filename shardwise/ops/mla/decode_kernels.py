"""Kernels of `decode.py`: queries absorbed and the new key appended, attention over latents, and its parts joined.

All heads of a sequence share one key [latent C | rotated R], whose latent is the value. The heads are the columns of
both products, keys * queries^T and latents^T * weights, so that few of them fill the matrix unit as many do, and a
latent is brought to a multiprocessor once for all.

Blocks of keys of all sequences are dealt out evenly to the programs, in order, whatever the sequences' lengths; where a
program's share ends amid a sequence, the sequence has several parts. Every kernel finds the shares from the positions.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.triton_support import await_predecessor, interpreting, tl, triton

_INTERPRET = tl.constexpr(interpreting())


@triton.jit
def product(x, y, total):
    """total + x y; the interpreter's product knows no bfloat16."""
    if _INTERPRET:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def _absorbed(
    q_ptr, weight_ptr, query_ptr, program, tokens, q_stride, N: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_C columns of one head's queries, for all tokens: their parts without rotation by the weight's [P, C].

    The weight is asked for before the kernels in front have made the queries.
    """
    head = (program // (C // BLOCK_C)).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    p = tl.arange(0, BLOCK_P)
    c = program % (C // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    q_at = q_ptr + t * q_stride + head * (P + R) + p[None, :]
    weight_at = weight_ptr + head * P * C + p[:, None] * C + c[None, :]
    weights = ()
    for part in tl.static_range(P // BLOCK_P):
        weights = weights + (tl.load(weight_at + part * BLOCK_P * C, eviction_policy="evict_first"),)
    await_predecessor(PDL)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for part in tl.static_range(P // BLOCK_P):
        total = product(tl.load(q_at + part * BLOCK_P, mask=t < tokens, other=0.0), weights[part], total)
    query_at = query_ptr + (t * N + head) * (C + R) + c[None, :]
    tl.store(query_at, total.to(query_ptr.dtype.element_ty), mask=t < tokens)


@triton.jit
def _rotated(first, second, cos, sin, kind: tl.constexpr):
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)


@triton.jit(do_not_specialize=["tokens", "eps"])
def absorb_kernel(
    q_ptr,  # [T, N, P + R], strided tokens
    key_ptr,  # [T, C + R], strided tokens
    weight_ptr,  # [N, P, C]
    norm_ptr,  # [C]
    rope_ptr,  # float32 [max_position, R]: cos of the first half, then sin
    pool_ptr,  # [pages, PAGE, C + R]
    table_ptr,  # int32 [rows, max_pages]
    slot_ptr,  # int32 [T], each sequence's row of the table
    position_ptr,  # int32 [T], keys already cached; negative: the row is padding
    query_ptr,  # [T, N, C + R]
    tokens,
    eps,
    q_stride,
    key_stride,
    max_pages,
    N: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs make the queries' latents; one for each token rotates its queries and appends its key."""
    PRODUCTS: tl.constexpr = N * (C // BLOCK_C)
    HALF: tl.constexpr = R // 2
    program = tl.program_id(0)
    if program < PRODUCTS:
        _absorbed(
            q_ptr, weight_ptr, query_ptr, program, tokens, q_stride, N, P, C, R, BLOCK_T, BLOCK_P, BLOCK_C, PDL
        )  # fmt: skip
    else:
        token = (program - PRODUCTS).to(tl.int64)
        position = tl.load(position_ptr + token)
        r = tl.arange(0, HALF)
        cos = tl.full([HALF], 1.0, tl.float32)
        sin = tl.zeros([HALF], tl.float32)
        if ROPE:
            angles = rope_ptr + tl.maximum(position, 0).to(tl.int64) * R + r
            cos = tl.load(angles)
            sin = tl.load(angles + HALF)
        slot = tl.load(slot_ptr + token).to(tl.int64)
        c = tl.arange(0, C)
        norm = tl.full([C], 1.0, tl.float32)
        if NORM:
            norm = tl.load(norm_ptr + c).to(tl.float32)
        await_predecessor(PDL)
        n = tl.arange(0, HEADS)[:, None]
        q_at = q_ptr + token * q_stride + n * (P + R) + P + r[None, :]
        q1 = tl.load(q_at, mask=n < N, other=0.0).to(tl.float32)
        q2 = tl.load(q_at + HALF, mask=n < N, other=0.0).to(tl.float32)
        q1, q2 = _rotated(q1, q2, cos, sin, query_ptr.dtype.element_ty)
        query_at = query_ptr + (token * N + n) * (C + R) + C + r[None, :]
        tl.store(query_at, q1, mask=n < N)
        tl.store(query_at + HALF, q2, mask=n < N)
        if position >= 0:
            key_at = key_ptr + token * key_stride
            latent = tl.load(key_at + c).to(tl.float32)
            if NORM:
                scale = 1.0 / tl.sqrt(tl.sum(latent * latent, 0) / C + eps)
                latent = latent * scale * norm
            k1 = tl.load(key_at + C + r).to(tl.float32)
            k2 = tl.load(key_at + C + HALF + r).to(tl.float32)
            k1, k2 = _rotated(k1, k2, cos, sin, pool_ptr.dtype.element_ty)
            page = tl.load(table_ptr + slot * max_pages + position // PAGE).to(tl.int64)  # which may be new
            row = pool_ptr + (page * PAGE + position % PAGE) * (C + R)
            tl.store(row + c, latent.to(pool_ptr.dtype.element_ty))
            tl.store(row + C + r, k1)
            tl.store(row + C + HALF + r, k2)


@triton.jit
def _blocks(position_ptr, sequences, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """Numbers of all sequences, and the blocks of keys that each has."""
    member = tl.arange(0, SEQUENCES)
    position = tl.load(position_ptr + member, mask=member < sequences, other=-1)
    return member, (tl.maximum(position, -1) + BLOCK) // BLOCK


@triton.jit
def _before(member, blocks, sequence):
    """Blocks of the sequences in front of one."""
    return tl.sum(tl.where(member < sequence, blocks, 0), 0)


@triton.jit(do_not_specialize=["sequences", "programs", "scale"])
def attend_kernel(
    query_ptr,  # [B, N, C + R]
    pool_ptr,  # [pages, PAGE, C + R]
    table_ptr,  # int32 [rows, max_pages]
    slot_ptr,  # int32 [B]
    position_ptr,  # int32 [B], the last key's; negative: no keys
    out_ptr,  # [B, N, C]
    part_ptr,  # float32 [programs + B, N, C]
    log_ptr,  # float32 [programs + B, N]: logarithm to base 2 of a part's weight
    sequences,
    programs,
    scale,  # times log2(e)
    max_pages,
    N: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program's share of all blocks, for HEADS heads. Part number (program + sequence) is no other's."""
    tile = tl.program_id(0)
    program = tl.program_id(1)
    member, blocks = _blocks(position_ptr, sequences, BLOCK, SEQUENCES)
    ends = tl.cumsum(blocks, 0)
    total = tl.sum(blocks, 0)
    share = tl.cdiv(total, programs)
    begin = program * share
    end = tl.minimum(begin + share, total)
    await_predecessor(PDL)
    head = tile * HEADS + tl.arange(0, HEADS)
    key = tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    r = tl.arange(0, R)
    while begin < end:
        sequence = tl.sum((ends <= begin).to(tl.int32), 0)
        before = _before(member, blocks, sequence)
        whole = tl.sum(tl.where(member == sequence, blocks, 0), 0)
        last = tl.load(position_ptr + sequence)
        table = table_ptr + tl.load(slot_ptr + sequence).to(tl.int64) * max_pages
        q_at = query_ptr + (sequence * N + head).to(tl.int64)[:, None] * (C + R)
        first = begin - before
        stop = tl.minimum(end - before, whole)
        top = tl.full([HEADS], float("-inf"), tl.float32)
        weights = tl.zeros([BLOCK, HEADS], tl.float32)
        q = tl.load(q_at + c[None, :], mask=(head < N)[:, None], other=0.0)
        acc = tl.zeros([C, HEADS], tl.float32)
        rotated_q = tl.load(q_at + C + r[None, :], mask=(head < N)[:, None], other=0.0)
        for block in tl.range(first, stop, num_stages=STAGES):
            at = block * BLOCK + key
            seen = (at <= last)[:, None]
            page = tl.load(table + block * BLOCK // PAGE).to(tl.int64)
            row = pool_ptr + (page * PAGE + at % PAGE)[:, None] * (C + R)
            rotated = tl.load(row + C + r[None, :], mask=seen, other=0.0)
            none = tl.zeros([BLOCK, HEADS], tl.float32)
            scores = product(rotated, tl.trans(rotated_q), none) * scale
            latent = tl.load(row + c[None, :], mask=seen, other=0.0)
            scores += product(latent, tl.trans(q), none) * scale
            scores = tl.where(seen, scores, float("-inf"))
            risen = tl.maximum(top, tl.max(scores, 0))
            decay = tl.exp2(top - risen)[None, :]
            p = tl.exp2(scores - risen[None, :])
            weights = weights * decay + p
            acc = product(tl.trans(latent), p.to(latent.dtype), acc * decay)
            top = risen
        weight = tl.sum(weights, 0)
        live = (head < N)[None, :]
        alone = stop - first == whole
        result = (sequence * N).to(tl.int64) * C
        place = head[None, :] * C + c[:, None]
        part = (program + sequence).to(tl.int64) * N
        mean = acc / weight[None, :]
        if alone:
            tl.store(out_ptr + result + place, mean.to(out_ptr.dtype.element_ty), mask=live)
        else:
            tl.store(part_ptr + part * C + place, mean, mask=live)
            tl.store(log_ptr + part + head, top + tl.log2(weight), mask=head < N)
        begin = before + stop


@triton.jit(do_not_specialize=["sequences", "programs"])
def join_kernel(
    position_ptr,
    out_ptr,
    part_ptr,
    log_ptr,
    sequences,
    programs,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some of a sequence's rows, BLOCK_C columns of a head, from the parts that attention left; zeros without keys."""
    sequence = tl.program_id(0)
    member, blocks = _blocks(position_ptr, sequences, BLOCK, SEQUENCES)
    share = tl.maximum(tl.cdiv(tl.sum(blocks, 0), programs), 1)
    before = _before(member, blocks, sequence)
    whole = tl.sum(tl.where(member == sequence, blocks, 0), 0)
    first = before // share
    count = tl.where(whole == 0, 0, tl.cdiv(before + whole, share) - first)
    await_predecessor(PDL)
    if count != 1:
        for row in range(tl.program_id(1), N * (C // BLOCK_C), tl.num_programs(1)):
            c = row % (C // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
            head = row // (C // BLOCK_C)
            top = tl.full([], float("-inf"), tl.float32)
            weight = tl.zeros([], tl.float32)
            total = tl.zeros([BLOCK_C], tl.float32)
            for base in range(0, count, PARTS):
                number = base + tl.arange(0, PARTS)
                there = number < count
                at = (first + number + sequence).to(tl.int64) * N + head
                logs = tl.load(log_ptr + at, mask=there, other=float("-inf"))
                parts = tl.load(part_ptr + at[:, None] * C + c[None, :], mask=there[:, None], other=0.0)
                risen = tl.maximum(top, tl.max(logs, 0))
                decay = tl.exp2(top - risen)
                factor = tl.exp2(logs - risen)
                weight = weight * decay + tl.sum(factor, 0)
                total = total * decay + tl.sum(parts * factor[:, None], 0)
                top = risen
            mean = total / tl.where(count == 0, 1.0, weight)
            tl.store(out_ptr + (sequence * N + head).to(tl.int64) * C + c, mean.to(out_ptr.dtype.element_ty))
