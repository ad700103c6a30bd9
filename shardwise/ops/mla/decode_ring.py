"""Attention of `decode.py` on Hopper: latents stream through a ring of shared memory, each brought once.

A program has four groups of warps, which wait for one another at barriers in shared memory alone:

- one warp brings latents, in tiles of 64 keys by 128 columns, as soon as a tile of the ring is free;
- a warpgroup multiplies keys with queries and makes weights of the scores;
- two warpgroups multiply the weights with the same chunks as values, half of the columns each.

So loads, both products and the softmax of different blocks overlap. Few heads are the columns of both products, as in
`decode_kernels.py`; 64 are their rows (WIDE), which takes fewer bytes of shared memory for each product.

A sequence's last block is brought so that its keys are the tile's last rows: rows in front of its page count as outside
of the tensor and are filled with zeros by the copy engine, so that nothing behind the last key is ever read.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.triton_support import tl

KEYS = tl.constexpr(64)
"""Of a block; also the columns of a copy: 128 bytes, the widest pattern that avoids conflicts of banks."""
COLUMNS = tl.constexpr(128)
"""Of a tile of the ring"""
MOST = tl.constexpr(128)
"""Sequences"""


@jit
def _add(x, y):
    return x + y


@jit
def _start(position_ptr, sequences, programs):
    """(sequence, blocks before it, first block and end of the program's share of all sequences' blocks)."""
    LINE: tl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    member = gl.arange(0, MOST, layout=LINE)
    position = gl.load(position_ptr + member, mask=member < sequences, other=-1)
    blocks = (gl.maximum(position, -1) + KEYS) // KEYS
    ends = gl.associative_scan(blocks, 0, _add)
    total = gl.sum(blocks, 0)
    share = gl.cdiv(total, programs)
    begin = gl.program_id(1) * share
    sequence = gl.sum((ends <= begin).to(gl.int32), 0)
    before = gl.sum(gl.where(member < sequence, blocks, 0), 0)
    return sequence, before, begin, gl.minimum(begin + share, total)


@jit
def _part(position_ptr, sequence, before, begin, end):
    """(last key, blocks of the sequence, first block of the program's part of it, end of the part)."""
    last = gl.load(position_ptr + sequence)
    whole = (gl.maximum(last, -1) + KEYS) // KEYS
    return last, whole, begin - before, gl.minimum(end - before, whole)


@jit
def _on(slot, phase, ahead: tl.constexpr, SLOTS: tl.constexpr):
    """(slot, phase of its barriers) of the tile `ahead` of one."""
    beyond = slot + ahead >= SLOTS
    return gl.where(beyond, slot + ahead - SLOTS, slot + ahead), gl.where(beyond, phase ^ 1, phase)


@jit
def _flat(tile, COLUMNS_: tl.constexpr, LAYOUT: tl.constexpr):
    """A tile [keys, columns], without the dimension of pages."""
    return tile._reinterpret(tile.dtype, [KEYS, COLUMNS_], LAYOUT)


@jit
def _bring(
    pool, table_ptr, slot_ptr, position_ptr, ring, turned, full, empty, full_turned, empty_turned,
    sequence, before, begin, end, max_pages,
    PAGE: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """All tiles of the program's blocks: of a block the rotated columns first, then those of both halves in turn."""
    slot = 0
    phase = 0
    number = 0
    while begin < end:
        last, whole, first, stop = _part(position_ptr, sequence, before, begin, end)
        table = table_ptr + gl.load(slot_ptr + sequence).to(gl.int64) * max_pages
        page = gl.load(table + first * KEYS // PAGE)
        for block in range(first, stop):
            next_page = gl.load(table + gl.minimum(block + 1, stop - 1) * KEYS // PAGE)
            row = block * KEYS % PAGE - gl.maximum(block * KEYS + KEYS - 1 - last, 0)
            here = number % TURNED
            gl.nvidia.hopper.mbarrier.wait(empty_turned.index(here), (number // TURNED & 1) ^ 1)
            gl.nvidia.hopper.mbarrier.expect(full_turned.index(here), KEYS * R * 2)
            for start in gl.static_range(0, R, KEYS):
                gl.nvidia.hopper.tma.async_copy_global_to_shared(
                    pool, [page, row, C + start], full_turned.index(here),
                    turned.index(here).slice(start, KEYS, 2),
                )  # fmt: skip
            for place in gl.static_range(C // COLUMNS):
                gl.nvidia.hopper.mbarrier.wait(empty.index(slot), phase ^ 1)
                gl.nvidia.hopper.mbarrier.expect(full.index(slot), KEYS * COLUMNS * 2)
                for start in gl.static_range(0, COLUMNS, KEYS):
                    gl.nvidia.hopper.tma.async_copy_global_to_shared(
                        pool, [page, row, (place % 2 * (C // 2) + place // 2 * COLUMNS) + start], full.index(slot),
                        ring.index(slot).slice(start, KEYS, 2),
                    )  # fmt: skip
                slot, phase = _on(slot, phase, 1, SLOTS)
            number += 1
            page = next_page
        begin = before + stop
        before += whole
        sequence += 1


@jit
def _held(query_ptr, row, left, C: tl.constexpr, R: tl.constexpr, HELD: tl.constexpr, MMA: tl.constexpr):
    """The last HELD chunks without rotation of `left` heads' queries, in registers as the products' left operands."""
    LEFT: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    at = query_ptr + row.to(gl.int64) * (C + R) + (C - HELD * KEYS)
    head = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, LEFT)), 1)
    at += head * (C + R)
    at += gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(0, LEFT)), 0)
    held = ()
    for chunk in gl.static_range(HELD):
        held = held + (gl.load(at + chunk * KEYS, mask=head < left, other=0.0),)
    return held


@jit
def _add_scores(scores, tile, queries, held, FIRST: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr):
    """scores + a tile's [keys, columns] products with the queries' chunks from FIRST on, of which SHARED are in shared
    memory and the others held."""
    for chunk in gl.static_range(tile.shape[1] // KEYS):
        keys = tile.slice(chunk * KEYS, KEYS, 1)
        if FIRST + chunk >= SHARED:
            scores = gl.nvidia.hopper.warpgroup_mma(
                held[FIRST + chunk - SHARED], keys.permute((1, 0)), scores, is_async=True
            )
        elif WIDE:
            scores = gl.nvidia.hopper.warpgroup_mma(
                queries.index(FIRST + chunk), keys.permute((1, 0)), scores, is_async=True
            )
        else:
            scores = gl.nvidia.hopper.warpgroup_mma(
                keys, queries.index(FIRST + chunk).permute((1, 0)), scores, is_async=True
            )
    return scores


@jit
def _begin(
    scores, ring, turned, full, full_turned, queries, held, number, slot, phase,
    FROM: tl.constexpr, TO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
    TURNED: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Begin the products of a block's tiles from FROM to TO, and before the first one of its rotated columns.

    Returns (scores, slot and phase behind these tiles).
    """
    SHARED: tl.constexpr = C // KEYS - HELD
    if FROM == 0:
        here = number % TURNED
        gl.nvidia.hopper.mbarrier.wait(full_turned.index(here), number // TURNED & 1)
        scores = _add_scores(scores, _flat(turned.index(here), R, TILE), queries, held, SHARED, 99, WIDE)
    for place in gl.static_range(FROM, TO):
        gl.nvidia.hopper.mbarrier.wait(full.index(slot), phase)
        scores = _add_scores(
            scores, _flat(ring.index(slot), COLUMNS, TILE), queries, held,
            place % 2 * (C // KEYS // 2) + place // 2 * (COLUMNS // KEYS), SHARED, WIDE,
        )  # fmt: skip
        slot, phase = _on(slot, phase, 1, SLOTS)
    return scores, slot, phase


@jit
def _power(x):
    """2 to the power of x."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@jit
def _send(
    scores, top, weight, sums, scale, message, weights, factors, made, taken,
    BUFFERS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Make a block's weights and how those before decay known; returns (top, weight, sums) with the block."""
    KEY_AXIS: tl.constexpr = 1 if WIDE else 0
    risen = gl.maximum(top, gl.max(scores, KEY_AXIS))
    decay = _power((top - risen) * scale)
    p = _power(scores * scale - gl.expand_dims(risen * scale, KEY_AXIS))
    buffer = message % BUFFERS
    gl.nvidia.hopper.mbarrier.wait(taken.index(buffer), (message // BUFFERS & 1) ^ 1)
    weights.index(buffer).store(p.to(weights.dtype))
    factors.index(buffer).store(decay)
    gl.nvidia.hopper.fence_async_shared()
    gl.thread_barrier()
    gl.nvidia.hopper.mbarrier.arrive(made.index(buffer))
    if WIDE:
        weight = weight * decay + gl.sum(p, KEY_AXIS)
    else:  # sums over keys, which are in all warps, wait for the part's end
        sums = sums * gl.expand_dims(decay, KEY_AXIS) + p
    return risen, weight, sums


@jit
def _score(
    query, query_ptr, position_ptr, log_ptr, ring, turned, full, full_turned, empty_turned, queries, arrived,
    weights, factors, made, taken, sequence, before, begin, end, scale, heads,
    C: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr,
    WIDE: tl.constexpr, HELD: tl.constexpr, AHEAD: tl.constexpr, BUFFERS: tl.constexpr, TILE: tl.constexpr,
    MMA: tl.constexpr,
):  # fmt: skip
    """The weights of each block, and how they make those before decay; behind a part's blocks what its sums are to be
    multiplied with. The products of a block begin before the weights of the one in front are made."""
    KEY_AXIS: tl.constexpr = 1 if WIDE else 0
    HEAD: tl.constexpr = gl.SliceLayout(KEY_AXIS, MMA)
    SHAPE: tl.constexpr = [HEADS, KEYS] if WIDE else [KEYS, HEADS]
    SHARED: tl.constexpr = C // KEYS - HELD
    CHUNKS: tl.constexpr = (C + R) // KEYS - HELD
    TILES: tl.constexpr = C // COLUMNS
    key = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1 - KEY_AXIS, MMA)), 1 - KEY_AXIS)
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, layout=HEAD)
    slot = 0
    phase = 0
    number = 0  # of blocks
    parts = 0
    while begin < end:
        last, whole, first, stop = _part(position_ptr, sequence, before, begin, end)
        if first < stop:
            gl.thread_barrier()  # the former part's products have ended in all warps
            gl.nvidia.hopper.mbarrier.expect(arrived, CHUNKS * HEADS * KEYS * 2)
            row = sequence * heads + gl.program_id(0) * HEADS
            for chunk in gl.static_range(CHUNKS):
                gl.nvidia.hopper.tma.async_copy_global_to_shared(
                    query, [row, (chunk if chunk < SHARED else chunk + HELD) * KEYS], arrived, queries.index(chunk)
                )
            held = _held(query_ptr, row, heads - gl.program_id(0) * HEADS, C, R, HELD, MMA)
            gl.nvidia.hopper.mbarrier.wait(arrived, parts & 1)
            top = gl.full([HEADS], float("-inf"), gl.float32, HEAD)
            weight = gl.zeros([HEADS], gl.float32, HEAD)
            sums = gl.zeros(SHAPE, gl.float32, MMA)
            none = gl.zeros(SHAPE, gl.float32, MMA)
            scores, slot, phase = _begin(
                none, ring, turned, full, full_turned, queries, held, number, slot, phase, 0, TILES, C, R, SLOTS,
                TURNED, HELD, WIDE, TILE,
            )  # fmt: skip
            scores = gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
            for _block in range(first, stop - 1):
                coming, slot, phase = _begin(
                    none, ring, turned, full, full_turned, queries, held, number + 1, slot, phase, 0, AHEAD, C, R,
                    SLOTS, TURNED, HELD, WIDE, TILE,
                )  # fmt: skip
                top, weight, sums = _send(
                    scores, top, weight, sums, scale, number + parts, weights, factors, made, taken, BUFFERS, WIDE
                )
                gl.nvidia.hopper.mbarrier.arrive(empty_turned.index(number % TURNED))
                coming, slot, phase = _begin(
                    coming, ring, turned, full, full_turned, queries, held, number + 1, slot, phase, AHEAD, TILES, C,
                    R, SLOTS, TURNED, HELD, WIDE, TILE,
                )  # fmt: skip
                scores = gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=0, deps=(coming,))
                number += 1
            scores = gl.where(key >= stop * KEYS - 1 - last, scores, float("-inf"))
            top, weight, sums = _send(
                scores, top, weight, sums, scale, number + parts, weights, factors, made, taken, BUFFERS, WIDE
            )
            gl.nvidia.hopper.mbarrier.arrive(empty_turned.index(number % TURNED))
            number += 1
            weight += gl.sum(sums, KEY_AXIS)
            message = number + parts
            buffer = message % BUFFERS
            gl.nvidia.hopper.mbarrier.wait(taken.index(buffer), (message // BUFFERS & 1) ^ 1)
            factors.index(buffer).store(1.0 / weight)
            gl.thread_barrier()
            gl.nvidia.hopper.mbarrier.arrive(made.index(buffer))
            parts += 1
            at = (gl.program_id(1) + sequence) * heads + head
            gl.store(log_ptr + at, top * scale + gl.log2(weight), mask=head < heads)
        begin = before + stop
        before += whole
        sequence += 1


@jit
def _gather(
    position_ptr, out_ptr, part_ptr, ring, full, empty, weights, factors, made, taken, sequence, before, begin, end,
    heads, HALF: tl.constexpr, C: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr,
    WIDE: tl.constexpr, BUFFERS: tl.constexpr, TILE: tl.constexpr, MMA: tl.constexpr,
):  # fmt: skip
    """Half of the columns of the weighted means."""
    KEY_AXIS: tl.constexpr = 1 if WIDE else 0
    HEAD: tl.constexpr = gl.SliceLayout(KEY_AXIS, MMA)
    SHAPE: tl.constexpr = [HEADS, COLUMNS] if WIDE else [COLUMNS, HEADS]
    MINE: tl.constexpr = C // COLUMNS // 2
    column = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(1 - KEY_AXIS, MMA)), 1 - KEY_AXIS)
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, layout=HEAD)
    place = gl.expand_dims(head * C, KEY_AXIS) + (column + HALF * MINE * COLUMNS)
    slot, phase = _on(0, 0, HALF, SLOTS)
    message = 0
    while begin < end:
        last, whole, first, stop = _part(position_ptr, sequence, before, begin, end)
        if first < stop:
            sums = ()
            for _number in gl.static_range(MINE):
                sums = sums + (gl.zeros(SHAPE, gl.float32, MMA),)
            for _block in range(first, stop):
                for number in gl.static_range(MINE):
                    here, there = _on(slot, phase, 2 * number, SLOTS)
                    gl.nvidia.hopper.mbarrier.wait(full.index(here), there)
                buffer = message % BUFFERS
                gl.nvidia.hopper.mbarrier.wait(made.index(buffer), message // BUFFERS & 1)
                decay = gl.expand_dims(factors.index(buffer).load(HEAD), KEY_AXIS)
                scaled = ()
                for number in gl.static_range(MINE):
                    scaled = scaled + (sums[number] * decay,)
                p = weights.index(buffer)
                products = ()
                for number in gl.static_range(MINE):
                    here, there = _on(slot, phase, 2 * number, SLOTS)
                    values = _flat(ring.index(here), COLUMNS, TILE)
                    if WIDE:
                        product = gl.nvidia.hopper.warpgroup_mma(p, values, scaled[number], is_async=True)
                    else:
                        product = gl.nvidia.hopper.warpgroup_mma(
                            values.permute((1, 0)), p, scaled[number], is_async=True
                        )
                    products = products + (product,)
                sums = products
                for number in gl.static_range(MINE):
                    sums = gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=MINE - 1 - number, deps=sums)
                    gl.thread_barrier()  # the products have ended in all warps
                    here, there = _on(slot, phase, 2 * number, SLOTS)
                    gl.nvidia.hopper.mbarrier.arrive(empty.index(here))
                gl.nvidia.hopper.mbarrier.arrive(taken.index(buffer))
                message += 1
                slot, phase = _on(slot, phase, C // COLUMNS, SLOTS)
            buffer = message % BUFFERS
            gl.nvidia.hopper.mbarrier.wait(made.index(buffer), message // BUFFERS & 1)
            factor = gl.expand_dims(factors.index(buffer).load(HEAD), KEY_AXIS)
            gl.thread_barrier()
            gl.nvidia.hopper.mbarrier.arrive(taken.index(buffer))
            message += 1
            live = gl.expand_dims(head < heads, KEY_AXIS)
            whole_at = out_ptr + sequence.to(gl.int64) * (heads * C)
            part_at = part_ptr + (gl.program_id(1) + sequence).to(gl.int64) * (heads * C)
            for number in gl.static_range(MINE):
                mean = sums[number] * factor
                if stop - first == whole:
                    gl.store(whole_at + place + number * COLUMNS, mean.to(out_ptr.dtype.element_ty), mask=live)
                else:
                    gl.store(part_at + place + number * COLUMNS, mean, mask=live)
        begin = before + stop
        before += whole
        sequence += 1


@jit(do_not_specialize=["sequences", "programs", "scale", "max_pages", "heads"])
def ring_kernel(
    query,  # descriptor of [B N, C + R], tiles of HEADS x 64
    query_ptr,
    pool,  # descriptor of [pages, PAGE, C + R], tiles of 1 x 64 x 64
    table_ptr, slot_ptr, position_ptr, out_ptr, part_ptr, log_ptr, sequences, programs, scale, max_pages, heads,
    C: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    HELD: tl.constexpr, AHEAD: tl.constexpr, SLOTS: tl.constexpr, TURNED: tl.constexpr, BUFFERS: tl.constexpr,
    SCORE_REGISTERS: tl.constexpr, VALUE_REGISTERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Arguments as those of `attend_kernel`, whose shares and parts these are; C a multiple of 256, R and PAGE of 64.

    WIDE     heads are the rows of the products; HEADS is 64
    HELD     chunks of 64 columns of the queries that stay in registers, with WIDE
    AHEAD    tiles whose scores begin before the weights of the block in front are made
    SLOTS    tiles of the ring, at least those of two blocks
    TURNED   blocks of rotated columns in a ring of their own
    BUFFERS  blocks whose weights are there at once
    """
    KIND: tl.constexpr = query.dtype
    MMA: tl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS if WIDE else HEADS, 16]
    )
    SUMS: tl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS if WIDE else HEADS, 16]
    )
    PAGES: tl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    TILE: tl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WEIGHTS: tl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128 if WIDE or HEADS > 32 else HEADS * 2, element_bitwidth=16, rank=2
    )
    LINE: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: tl.constexpr = gl.nvidia.hopper.mbarrier.MBarrierLayout()
    sequence, before, begin, end = _start(position_ptr, sequences, programs)
    ring = gl.allocate_shared_memory(KIND, [SLOTS, 1, KEYS, COLUMNS], PAGES)
    turned = gl.allocate_shared_memory(KIND, [TURNED, 1, KEYS, R], PAGES)
    queries = gl.allocate_shared_memory(KIND, [(C + R) // KEYS - HELD, HEADS, KEYS], TILE)
    weights = gl.allocate_shared_memory(KIND, [BUFFERS, HEADS, KEYS] if WIDE else [BUFFERS, KEYS, HEADS], WEIGHTS)
    factors = gl.allocate_shared_memory(gl.float32, [BUFFERS, HEADS], LINE)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    full_turned = gl.allocate_shared_memory(gl.int64, [TURNED, 1], BARRIER)
    empty_turned = gl.allocate_shared_memory(gl.int64, [TURNED, 1], BARRIER)
    made = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    taken = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    arrived = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for slot in gl.static_range(SLOTS):
        gl.nvidia.hopper.mbarrier.init(full.index(slot), count=1)
        gl.nvidia.hopper.mbarrier.init(empty.index(slot), count=1)
    for number in gl.static_range(TURNED):
        gl.nvidia.hopper.mbarrier.init(full_turned.index(number), count=1)
        gl.nvidia.hopper.mbarrier.init(empty_turned.index(number), count=1)
    for buffer in gl.static_range(BUFFERS):
        gl.nvidia.hopper.mbarrier.init(made.index(buffer), count=1)
        gl.nvidia.hopper.mbarrier.init(taken.index(buffer), count=2)
    gl.nvidia.hopper.mbarrier.init(arrived, count=1)
    gl.nvidia.hopper.fence_async_shared()
    gl.thread_barrier()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gl.warp_specialize(
        [
            (_gather, (
                position_ptr, out_ptr, part_ptr, ring, full, empty, weights, factors, made, taken,
                sequence, before, begin, end, heads, 0, C, SLOTS, HEADS, WIDE, BUFFERS, TILE, SUMS,
            )),
            (_gather, (
                position_ptr, out_ptr, part_ptr, ring, full, empty, weights, factors, made, taken,
                sequence, before, begin, end, heads, 1, C, SLOTS, HEADS, WIDE, BUFFERS, TILE, SUMS,
            )),
            (_score, (
                query, query_ptr, position_ptr, log_ptr, ring, turned, full, full_turned, empty_turned, queries,
                arrived, weights, factors, made, taken, sequence, before, begin, end, scale, heads, C, R, SLOTS,
                TURNED, HEADS, WIDE, HELD, AHEAD, BUFFERS, TILE, MMA,
            )),
            (_bring, (
                pool, table_ptr, slot_ptr, position_ptr, ring, turned, full, empty, full_turned, empty_turned,
                sequence, before, begin, end, max_pages, PAGE, C, R, SLOTS, TURNED,
            )),
        ],
        [4, 4, 1],
        [VALUE_REGISTERS, SCORE_REGISTERS, 24],
    )  # fmt: skip
