"""The warpgroup of `decode_ring.py` that multiplies keys with queries and makes weights of the scores.

What it makes is sent on block by block: (factors, weights, decided, made, taken) are buffers of what the sums before
decay to and of a block's weights, each with a barrier that says it is there, and one that says both have been read.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.mla.decode_tiles import COLUMNS, KEYS, flat, on, part_of, tile_column
from shardwise.ops.triton_support import tl


@jit
def _take(query, queries, arrived, row, parts, HEADS: tl.constexpr, CHUNKS: tl.constexpr):
    """Bring the queries of a part, in chunks of 64 columns."""
    gl.thread_barrier()  # the former part's products have ended in all warps
    gl.nvidia.hopper.mbarrier.expect(arrived, CHUNKS * HEADS * KEYS * 2)
    for chunk in gl.static_range(CHUNKS):
        gl.nvidia.hopper.tma.async_copy_global_to_shared(query, [row, chunk * KEYS], arrived, queries.index(chunk))
    gl.nvidia.hopper.mbarrier.wait(arrived, parts & 1)


@jit
def _add_scores(scores, tile, queries, FIRST: tl.constexpr, WIDE: tl.constexpr):
    """Begin to add a tile's [keys, columns] products with the queries' chunks from FIRST on."""
    for chunk in gl.static_range(tile.shape[1] // KEYS):
        keys, query = tile.slice(chunk * KEYS, KEYS, 1), queries.index(FIRST + chunk)
        if WIDE:
            scores = gl.nvidia.hopper.warpgroup_mma(query, keys.permute((1, 0)), scores, is_async=True)
        else:
            scores = gl.nvidia.hopper.warpgroup_mma(keys, query.permute((1, 0)), scores, is_async=True)
    return scores


@jit
def _scores(
    latents, rotated, queries, number, slot, phase,
    C: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, TURNED: tl.constexpr, SHAPE: tl.constexpr,
    WIDE: tl.constexpr, TILE: tl.constexpr, MMA: tl.constexpr,
):  # fmt: skip
    """(scores of block number `number`, slot and phase behind it), each tile's as soon as it is there."""
    tiles, full, _empty = latents
    turned, full_turned, _empty_turned = rotated
    here = number % TURNED
    gl.nvidia.hopper.mbarrier.wait(full_turned.index(here), number // TURNED & 1)
    scores = gl.zeros(SHAPE, gl.float32, MMA)
    scores = _add_scores(scores, flat(turned.index(here), R, TILE), queries, C // KEYS, WIDE)
    for place in gl.static_range(C // COLUMNS):
        gl.nvidia.hopper.mbarrier.wait(full.index(slot), phase)
        scores = _add_scores(
            scores, flat(tiles.index(slot), COLUMNS, TILE), queries, tile_column(place, C) // KEYS, WIDE
        )
        slot, phase = on(slot, phase, 1, SLOTS)
    return gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=0, deps=(scores,)), slot, phase


@jit
def _power(x):
    """2 to the power of x, without care for denormals: one instruction."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@jit
def _send(scores, top, weight, sums, scale, message, sent, BUFFERS: tl.constexpr, WIDE: tl.constexpr):
    """Send a block's weights and what those before decay to; returns (top, weight, sums) with the block.

    top     largest score of each head
    weight  with WIDE the sum of each head's weights; else sums have them [KEYS, HEADS], as keys are in all warps
    """
    KEY_AXIS: tl.constexpr = 1 if WIDE else 0
    factors, weights, decided, made, taken = sent
    risen = gl.maximum(top, gl.max(scores, KEY_AXIS))
    decay = _power((top - risen) * scale)
    buffer = message % BUFFERS
    gl.nvidia.hopper.mbarrier.wait(taken.index(buffer), (message // BUFFERS & 1) ^ 1)
    factors.index(buffer).store(decay)
    gl.thread_barrier()
    gl.nvidia.hopper.mbarrier.arrive(decided.index(buffer))
    p = _power(scores * scale - gl.expand_dims(risen * scale, KEY_AXIS))
    weights.index(buffer).store(p.to(weights.dtype))
    gl.nvidia.hopper.fence_async_shared()
    gl.thread_barrier()
    gl.nvidia.hopper.mbarrier.arrive(made.index(buffer))
    if WIDE:
        weight = weight * decay + gl.sum(p, KEY_AXIS)
    else:
        sums = sums * gl.expand_dims(decay, KEY_AXIS) + p
    return risen, weight, sums


@jit
def _send_factor(factor, message, sent, BUFFERS: tl.constexpr):
    """Behind a part's blocks: what its sums are to be multiplied with."""
    factors, _weights, decided, made, taken = sent
    buffer = message % BUFFERS
    gl.nvidia.hopper.mbarrier.wait(taken.index(buffer), (message // BUFFERS & 1) ^ 1)
    factors.index(buffer).store(factor)
    gl.thread_barrier()
    gl.nvidia.hopper.mbarrier.arrive(decided.index(buffer))
    gl.nvidia.hopper.mbarrier.arrive(made.index(buffer))


@jit
def score(
    query, position_ptr, log_ptr, latents, rotated, queries, arrived, sent, share, scale, heads,
    C: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr,
    WIDE: tl.constexpr, BUFFERS: tl.constexpr, TILE: tl.constexpr, MMA: tl.constexpr,
):  # fmt: skip
    """The weights of all blocks of the program."""
    KEY_AXIS: tl.constexpr = 1 if WIDE else 0
    HEAD: tl.constexpr = gl.SliceLayout(KEY_AXIS, MMA)
    SHAPE: tl.constexpr = [HEADS, KEYS] if WIDE else [KEYS, HEADS]
    sequence, before, begin, end = share
    empty_turned = rotated[2]
    key = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1 - KEY_AXIS, MMA)), 1 - KEY_AXIS)
    first_head = gl.program_id(0) * HEADS
    head = first_head + gl.arange(0, HEADS, layout=HEAD)
    slot = 0
    phase = 0
    number = 0  # of blocks
    parts = 0
    while begin < end:
        last, whole, first, stop = part_of(position_ptr, sequence, before, begin, end)
        if first < stop:
            _take(query, queries, arrived, sequence * heads + first_head, parts, HEADS, (C + R) // KEYS)
            top = gl.full([HEADS], float("-inf"), gl.float32, HEAD)
            weight = gl.zeros([HEADS], gl.float32, HEAD)
            sums = gl.zeros(SHAPE, gl.float32, MMA)
            for block in range(first, stop):
                scores, slot, phase = _scores(
                    latents, rotated, queries, number, slot, phase, C, R, SLOTS, TURNED, SHAPE, WIDE, TILE, MMA
                )  # fmt: skip
                hidden = block * KEYS + KEYS - 1 - last
                if hidden > 0:
                    scores = gl.where(key >= hidden, scores, float("-inf"))
                top, weight, sums = _send(scores, top, weight, sums, scale, number + parts, sent, BUFFERS, WIDE)
                gl.nvidia.hopper.mbarrier.arrive(empty_turned.index(number % TURNED))
                number += 1
            weight += gl.sum(sums, KEY_AXIS)
            _send_factor(1.0 / weight, number + parts, sent, BUFFERS)
            parts += 1
            at = (gl.program_id(1) + sequence) * heads + head
            gl.store(log_ptr + at, top * scale + gl.log2(weight), mask=head < heads)
        begin = before + stop
        before += whole
        sequence += 1
