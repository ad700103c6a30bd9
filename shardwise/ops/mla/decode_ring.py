"""Attention of `decode.py` on Hopper: latents stream through a ring of shared memory, each brought once.

A program has four groups of warps, which wait for one another at barriers in shared memory alone:

- one warp brings latents, in tiles of 64 keys by 128 columns, as soon as a tile of the ring is free;
- a warpgroup multiplies keys with queries and makes weights of the scores (`decode_scores.py`);
- two warpgroups multiply the weights with the same tiles as values, half of the columns each.

So loads, both products and the softmax of different blocks overlap. Few heads are the columns of both products, as in
`decode_kernels.py`; 64 are their rows (WIDE), which reads less of shared memory for each product.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.mla.decode_scores import score
from shardwise.ops.mla.decode_tiles import COLUMNS, KEYS, bring, flat, on, part_of, share_of
from shardwise.ops.triton_support import tl


@jit
def _add_block(
    sums, latents, sent, number, slot, phase,
    SLOTS: tl.constexpr, BUFFERS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The sums of every second tile's columns with one block's values; its tiles are free as soon as they are read."""
    KEY_AXIS: tl.constexpr = 1 if WIDE else 0
    tiles, full, empty = latents
    factors, weights, decided, made, taken = sent
    buffer = number % BUFFERS
    gl.nvidia.hopper.mbarrier.wait(decided.index(buffer), number // BUFFERS & 1)
    decay = gl.expand_dims(factors.index(buffer).load(gl.SliceLayout(KEY_AXIS, SUMS)), KEY_AXIS)
    scaled = ()
    for place in gl.static_range(len(sums)):
        scaled = scaled + (sums[place] * decay,)
    for place in gl.static_range(len(sums)):
        here, there = on(slot, phase, 2 * place, SLOTS)
        gl.nvidia.hopper.mbarrier.wait(full.index(here), there)
    gl.nvidia.hopper.mbarrier.wait(made.index(buffer), number // BUFFERS & 1)
    sums = ()
    p = weights.index(buffer)
    for place in gl.static_range(len(scaled)):
        here, there = on(slot, phase, 2 * place, SLOTS)
        values = flat(tiles.index(here), COLUMNS, TILE)
        if WIDE:
            product = gl.nvidia.hopper.warpgroup_mma(p, values, scaled[place], is_async=True)
        else:
            product = gl.nvidia.hopper.warpgroup_mma(values.permute((1, 0)), p, scaled[place], is_async=True)
        sums = sums + (product,)
    for place in gl.static_range(len(scaled)):
        sums = gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=len(scaled) - 1 - place, deps=sums)
        gl.thread_barrier()  # the products have ended in all warps
        here, there = on(slot, phase, 2 * place, SLOTS)
        gl.nvidia.hopper.mbarrier.arrive(empty.index(here))
    gl.nvidia.hopper.mbarrier.arrive(taken.index(buffer))
    return sums


@jit
def _gather(
    position_ptr, out_ptr, part_ptr, latents, sent, share, heads,
    HALF: tl.constexpr, C: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    BUFFERS: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Half of the columns of the weighted means of all parts."""
    KEY_AXIS: tl.constexpr = 1 if WIDE else 0
    HEAD: tl.constexpr = gl.SliceLayout(KEY_AXIS, SUMS)
    SHAPE: tl.constexpr = [HEADS, COLUMNS] if WIDE else [COLUMNS, HEADS]
    TILES: tl.constexpr = C // COLUMNS
    sequence, before, begin, end = share
    column = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(1 - KEY_AXIS, SUMS)), 1 - KEY_AXIS)
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, layout=HEAD)
    live = gl.expand_dims(head < heads, KEY_AXIS)
    at = gl.expand_dims(head * C, KEY_AXIS) + (column + HALF * (C // 2))
    slot, phase = on(0, 0, HALF, SLOTS)
    number = 0  # of what was sent
    while begin < end:
        last, whole, first, stop = part_of(position_ptr, sequence, before, begin, end)
        if first < stop:
            sums = ()
            for _tile in gl.static_range(TILES // 2):
                sums = sums + (gl.zeros(SHAPE, gl.float32, SUMS),)
            for _block in range(first, stop):
                sums = _add_block(sums, latents, sent, number, slot, phase, SLOTS, BUFFERS, WIDE, TILE, SUMS)
                slot, phase = on(slot, phase, TILES, SLOTS)
                number += 1
            factors, _weights, _decided, made, taken = sent
            buffer = number % BUFFERS
            gl.nvidia.hopper.mbarrier.wait(made.index(buffer), number // BUFFERS & 1)
            factor = gl.expand_dims(factors.index(buffer).load(HEAD), KEY_AXIS)
            gl.thread_barrier()
            gl.nvidia.hopper.mbarrier.arrive(taken.index(buffer))
            number += 1
            whole_at = out_ptr + sequence.to(gl.int64) * (heads * C)
            part_at = part_ptr + (gl.program_id(1) + sequence).to(gl.int64) * (heads * C)
            for tile in gl.static_range(TILES // 2):
                mean = sums[tile] * factor
                if stop - first == whole:
                    gl.store(whole_at + at + tile * COLUMNS, mean.to(out_ptr.dtype.element_ty), mask=live)
                else:
                    gl.store(part_at + at + tile * COLUMNS, mean, mask=live)
        begin = before + stop
        before += whole
        sequence += 1


@jit
def _barriers(COUNT: tl.constexpr, ARRIVALS: tl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], gl.nvidia.hopper.mbarrier.MBarrierLayout())
    for number in gl.static_range(COUNT):
        gl.nvidia.hopper.mbarrier.init(barriers.index(number), count=ARRIVALS)
    return barriers


@jit(do_not_specialize=["sequences", "programs", "scale", "max_pages", "heads"])
def ring_kernel(
    query,  # descriptor of [B N, C + R], tiles of HEADS x 64
    pool,  # descriptor of [pages, PAGE, C + R], tiles of 1 x 64 x 64
    table_ptr, slot_ptr, position_ptr, out_ptr, part_ptr, log_ptr, sequences, programs, scale, max_pages, heads,
    C: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    SLOTS: tl.constexpr, TURNED: tl.constexpr, BUFFERS: tl.constexpr, SCORE_REGISTERS: tl.constexpr,
    VALUE_REGISTERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Arguments as those of `attend_kernel`, whose shares and parts these are; C is 512, R 64, PAGE a multiple of 64.

    WIDE     heads are the rows of the products; HEADS is 64
    SLOTS    tiles of the ring, at least those of a block
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
    share = share_of(position_ptr, sequences, programs)
    tiles = gl.allocate_shared_memory(KIND, [SLOTS, 1, KEYS, COLUMNS], PAGES)
    turned = gl.allocate_shared_memory(KIND, [TURNED, 1, KEYS, R], PAGES)
    queries = gl.allocate_shared_memory(KIND, [(C + R) // KEYS, HEADS, KEYS], TILE)
    weights = gl.allocate_shared_memory(KIND, [BUFFERS, HEADS, KEYS] if WIDE else [BUFFERS, KEYS, HEADS], WEIGHTS)
    factors = gl.allocate_shared_memory(gl.float32, [BUFFERS, HEADS], LINE)
    latents = (tiles, _barriers(SLOTS, 1), _barriers(SLOTS, 1))
    rotated = (turned, _barriers(TURNED, 1), _barriers(TURNED, 1))
    sent = (factors, weights, _barriers(BUFFERS, 1), _barriers(BUFFERS, 1), _barriers(BUFFERS, 2))
    arrived = _barriers(1, 1).index(0)
    gl.nvidia.hopper.fence_async_shared()
    gl.thread_barrier()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gl.warp_specialize(
        [
            (_gather, (
                position_ptr, out_ptr, part_ptr, latents, sent, share, heads,
                0, C, SLOTS, HEADS, WIDE, BUFFERS, TILE, SUMS,
            )),
            (_gather, (
                position_ptr, out_ptr, part_ptr, latents, sent, share, heads,
                1, C, SLOTS, HEADS, WIDE, BUFFERS, TILE, SUMS,
            )),
            (score, (
                query, position_ptr, log_ptr, latents, rotated, queries, arrived, sent, share, scale, heads,
                C, R, SLOTS, TURNED, HEADS, WIDE, BUFFERS, TILE, MMA,
            )),
            (bring, (
                pool, table_ptr, slot_ptr, position_ptr, latents, rotated, share, max_pages, PAGE, C, R, SLOTS, TURNED,
            )),
        ],
        [4, 4, 1],
        [VALUE_REGISTERS, SCORE_REGISTERS, 24],
    )  # fmt: skip
