"""Grouped GEMM on Hopper for many tokens an expert, 16-bit activations and e4m3 weights with scales of their own.

As in `wide_gemm` one warp brings the tiles and two warpgroups multiply them. Between these, warps turn codes into
bfloat16 numbers, scales included, in a ring of shared memory of its own: each tile once for all tokens of a block,
while the tensor cores work on those before it.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.moe.wide_gemm import finish, place, whole_tiles
from shardwise.ops.triton_support import tl

PIECE = tl.constexpr(64)
"""Rows of weights that are turned at once, in registers."""
TURNERS, REGISTERS = tl.constexpr(4), tl.constexpr(96)
"""Warps that turn codes, and registers of each of their threads. Two warps took 5 % longer."""


@jit
def _on(count, ring):
    """(slot, phase) of a ring's `count`th use."""
    SLOTS: tl.constexpr = ring[0].shape[0]
    return count % SLOTS, count // SLOTS & 1


@jit
def _await_full(ring, count):
    slot, phase = _on(count, ring)
    gl.nvidia.hopper.mbarrier.wait(ring[1].index(slot), phase)
    return ring[0].index(slot)


@jit
def _await_empty(ring, count):
    slot, phase = _on(count, ring)
    gl.nvidia.hopper.mbarrier.wait(ring[2].index(slot), phase ^ 1)
    return ring[0].index(slot)


@jit
def _mark(ring, count, EMPTY: tl.constexpr):
    """The slot is full, or empty."""
    slot, _phase = _on(count, ring)
    gl.nvidia.hopper.mbarrier.arrive(ring[2 if EMPTY else 1].index(slot))


@jit
def _bring(x, w, tokens, codes, count, row, start, steps, out_rows, GATED: tl.constexpr, BN: tl.constexpr):
    """The steps of one tile; the first is the program's `count`th."""
    BT: tl.constexpr = tokens[0].shape[1]
    BK: tl.constexpr = tokens[0].shape[2]
    for step in range(steps):
        k = step * BK
        target = _await_empty(tokens, count)
        there = tokens[1].index(_on(count, tokens)[0])
        gl.nvidia.hopper.mbarrier.expect(there, BT * BK * 2)
        gl.nvidia.hopper.tma.async_copy_global_to_shared(x, [start, k], there, target)
        target = _await_empty(codes, count)
        there = codes[1].index(_on(count, codes)[0])
        gl.nvidia.hopper.mbarrier.expect(there, codes[0].shape[1] * BK)
        gl.nvidia.hopper.tma.async_copy_global_to_shared(w, [row, k], there, target.slice(0, BN, 0))
        if GATED:
            gl.nvidia.hopper.tma.async_copy_global_to_shared(w, [row + out_rows, k], there, target.slice(BN, BN, 0))
        count += 1


@jit
def _scale(
    scale_ptr, expert, first_row, step, columns, out_rows,
    FIRST: tl.constexpr, HALF: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, TILED: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Of PIECE rows from `first_row` + FIRST on, of an expert's first or second half: a vector over them."""
    GRAIN: tl.constexpr = 128 if TILED else 1
    row = gl.minimum(first_row + FIRST + gl.arange(0, PIECE, layout=ROW), out_rows - 1)
    line = (expert * (2 if GATED else 1) + HALF) * gl.cdiv(out_rows, GRAIN) + row // GRAIN
    return gl.load(scale_ptr + (line * gl.cdiv(columns, 128) + step * BK // 128 if TILED else line))


@jit
def _scales(
    scale_ptr, expert, first_row, step, columns, out_rows,
    WIDTH: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, TILED: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """The scales of a step's pieces."""
    EACH: tl.constexpr = WIDTH // 2 if GATED else WIDTH
    found = ()
    for first in gl.static_range(0, WIDTH, PIECE):
        scale = _scale(
            scale_ptr, expert, first_row, step, columns, out_rows, first % EACH, first // EACH, BK, GATED, TILED, ROW
        )  # fmt: skip
        found = found + (scale,)
    return found


@jit
def _turn(
    codes, weights, scale_ptr, count, expert, first_row, steps, columns, out_rows,
    WIDTH: tl.constexpr, GATED: tl.constexpr, TILED: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The codes of one tile's steps to numbers, as they come."""
    BK: tl.constexpr = codes[0].shape[2]
    ROW: tl.constexpr = gl.SliceLayout(1, PIECES)
    scales = _scales(scale_ptr, expert, first_row, 0, columns, out_rows, WIDTH, BK, GATED, TILED, ROW)
    for step in range(steps):
        ahead = scales
        if TILED:  # asked for a step ahead: they come from memory
            later = gl.minimum(step + 1, steps - 1)
            ahead = _scales(scale_ptr, expert, first_row, later, columns, out_rows, WIDTH, BK, GATED, TILED, ROW)
        source, target = _await_full(codes, count), _await_empty(weights, count)
        for piece in gl.static_range(WIDTH // PIECE):
            numbers = source.slice(piece * PIECE, PIECE, 0).load(PIECES).to(gl.float32) * scales[piece][:, None]
            target.slice(piece * PIECE, PIECE, 0).store(numbers.to(weights[0].dtype))
        gl.nvidia.hopper.fence_async_shared()
        gl.thread_barrier()
        _mark(weights, count, False)
        _mark(codes, count, True)
        scales = ahead
        count += 1


@jit
def _products(tokens, weights, count, steps, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """[ROWS, WIDTH] sums of a tile over all steps, the first of which is the program's `count`th."""
    acc = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    for step in range(steps):
        x = _await_full(tokens, count).slice(0, ROWS, 0)
        w = _await_full(weights, count).slice(0, WIDTH, 0).permute((1, 0))
        acc = gl.nvidia.hopper.warpgroup_mma(x, w, acc, is_async=True)
        acc = gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        if step > 0:  # the product before has read its slots, in both warpgroups
            gl.thread_barrier()
            _mark(tokens, count - 1, True)
            _mark(weights, count - 1, True)
        count += 1
    acc = gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    gl.thread_barrier()
    _mark(tokens, count - 1, True)
    _mark(weights, count - 1, True)
    return acc


@jit
def _load(
    x, w, tokens, codes, block_ptr, columns, out_rows,
    GATED: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, SHORT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Bring all tiles of the program, in their order."""
    blocks, per_block, steps = gl.load(block_ptr), gl.cdiv(out_rows, BN), gl.cdiv(columns, tokens[0].shape[2])
    whole = whole_tiles(blocks * per_block, HALVES)
    count = 0
    for index in range(gl.program_id(0), whole, gl.num_programs(0)):
        block, tile = place(index, blocks, per_block, GROUP, SHORT)
        row = gl.load(block_ptr + 1 + 3 * block) * (out_rows * (2 if GATED else 1)) + tile * BN
        start = gl.load(block_ptr + 2 + 3 * block)
        _bring(x, w, tokens, codes, count, row, start, steps, out_rows, GATED, BN)
        count += steps
    if HALVES:
        index = whole + gl.program_id(0) // 2
        if index < blocks * per_block:  # twice the rows that are needed, as the descriptor has them
            block, tile = place(index, blocks, per_block, GROUP, SHORT)
            row = gl.load(block_ptr + 1 + 3 * block) * out_rows + tile * BN + gl.program_id(0) % 2 * (BN // 2)
            start = gl.load(block_ptr + 2 + 3 * block)
            _bring(x, w, tokens, codes, count, row, start, steps, out_rows, GATED, BN)


@jit
def _widen(
    codes, weights, block_ptr, scale_ptr, columns, out_rows,
    GATED: tl.constexpr, TILED: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, SHORT: tl.constexpr,
    HALVES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Turn the weights of all tiles of the program."""
    WIDTH: tl.constexpr = weights[0].shape[1]
    blocks, per_block, steps = gl.load(block_ptr), gl.cdiv(out_rows, BN), gl.cdiv(columns, codes[0].shape[2])
    whole = whole_tiles(blocks * per_block, HALVES)
    count = 0
    for index in range(gl.program_id(0), whole, gl.num_programs(0)):
        block, tile = place(index, blocks, per_block, GROUP, SHORT)
        expert = gl.load(block_ptr + 1 + 3 * block)
        _turn(
            codes, weights, scale_ptr, count, expert, tile * BN, steps, columns, out_rows, WIDTH, GATED, TILED, PIECES
        )  # fmt: skip
        count += steps
    if HALVES:
        index = whole + gl.program_id(0) // 2
        if index < blocks * per_block:
            block, tile = place(index, blocks, per_block, GROUP, SHORT)
            expert = gl.load(block_ptr + 1 + 3 * block)
            row = tile * BN + gl.program_id(0) % 2 * (BN // 2)
            _turn(
                codes, weights, scale_ptr, count, expert, row, steps, columns, out_rows, BN // 2, GATED, TILED, PIECES
            )  # fmt: skip


@jit
def _multiply(
    tokens, weights, out_ptr, sorted_ptr, block_ptr, columns, out_rows,
    GATED: tl.constexpr, BY_PAIR: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, SHORT: tl.constexpr,
    HALVES: tl.constexpr, ACC: tl.constexpr, SHORT_ACC: tl.constexpr, HALF_ACC: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """The products of all steps, and each tile's results."""
    BT: tl.constexpr = tokens[0].shape[1]
    WIDTH: tl.constexpr = weights[0].shape[1]
    blocks, per_block, steps = gl.load(block_ptr), gl.cdiv(out_rows, BN), gl.cdiv(columns, tokens[0].shape[2])
    whole = whole_tiles(blocks * per_block, HALVES)
    count = 0
    for index in range(gl.program_id(0), whole, gl.num_programs(0)):
        block, tile = place(index, blocks, per_block, GROUP, SHORT)
        start, stop = gl.load(block_ptr + 2 + 3 * block), gl.load(block_ptr + 3 + 3 * block)
        if SHORT > 0 and stop - start <= SHORT:
            few = _products(tokens, weights, count, steps, SHORT, WIDTH, SHORT_ACC)
            finish(
                few, out_ptr, sorted_ptr, sorted_ptr, 1.0, start, stop, tile * BN, out_rows, BN, GATED, BY_PAIR, False,
                False, False, OUT,
            )  # fmt: skip
        else:
            acc = _products(tokens, weights, count, steps, BT, WIDTH, ACC)
            finish(
                acc, out_ptr, sorted_ptr, sorted_ptr, 1.0, start, stop, tile * BN, out_rows, BN, GATED, BY_PAIR, False,
                False, False, OUT,
            )  # fmt: skip
        count += steps
    if HALVES:
        index = whole + gl.program_id(0) // 2
        if index < blocks * per_block:
            block, tile = place(index, blocks, per_block, GROUP, SHORT)
            start, stop = gl.load(block_ptr + 2 + 3 * block), gl.load(block_ptr + 3 + 3 * block)
            acc = _products(tokens, weights, count, steps, BT, BN // 2, HALF_ACC)
            row = tile * BN + gl.program_id(0) % 2 * (BN // 2)
            finish(
                acc, out_ptr, sorted_ptr, sorted_ptr, 1.0, start, stop, row, out_rows, BN // 2, GATED, BY_PAIR, False,
                False, False, OUT,
            )  # fmt: skip


@jit
def _ring(KIND: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tiles in shared memory, and for each a barrier of when it is full and one of when it is empty."""
    BITS: tl.constexpr = KIND.primitive_bitwidth
    TILE: tl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=COLUMNS * BITS // 8, element_bitwidth=BITS, rank=2)
    tiles = gl.allocate_shared_memory(KIND, [SLOTS, ROWS, COLUMNS], TILE)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], gl.nvidia.hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], gl.nvidia.hopper.mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        gl.nvidia.hopper.mbarrier.init(full.index(slot), count=1)
        gl.nvidia.hopper.mbarrier.init(empty.index(slot), count=1)
    return tiles, full, empty


@jit
def wide_float8(
    x, w, out_ptr, sorted_ptr, block_ptr, scale_ptr, columns, out_rows,
    GATED: tl.constexpr, BY_PAIR: tl.constexpr, TILED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, SHORT: tl.constexpr, HALVES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (token block, n tile); arguments as in `wide_gemm`, w of e4m3 codes.

    TILED   scale_ptr has the scales of 128 x 128 weights each, [E, ceil(N/128), ceil(K/128)], twice as many rows with
            GATED; otherwise those of the weights' rows, [E, N] or [E, 2N]
    STAGES  steps of activations, of codes and of numbers made of them that are there or on their way
    """
    WIDTH: tl.constexpr = 2 * BN if GATED else BN
    ACC: tl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, WIDTH, 16]
    )
    SHORT_ACC: tl.constexpr = gl.NVMMADistributedLayout(  # both warpgroups on the same rows
        version=[3, 0], warps_per_cta=[4, gl.num_warps() // 4], instr_shape=[16, BN // 2, 16]
    )
    HALF_ACC: tl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BN // 2, 16]
    )
    OUT: tl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    PIECES: tl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [TURNERS, 1], [1, 0])
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tokens = _ring(x.dtype, STAGES, BT, BK)
    codes = _ring(w.dtype, STAGES, WIDTH, BK)
    weights = _ring(x.dtype, STAGES, WIDTH, BK)
    gl.nvidia.hopper.fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_multiply, (
                tokens, weights, out_ptr, sorted_ptr, block_ptr, columns, out_rows, GATED, BY_PAIR, BN, GROUP, SHORT,
                HALVES, ACC, SHORT_ACC, HALF_ACC, OUT,
            )),
            (_widen, (
                codes, weights, block_ptr, scale_ptr, columns, out_rows, GATED, TILED, BN, GROUP, SHORT, HALVES, PIECES,
            )),
            (_load, (x, w, tokens, codes, block_ptr, columns, out_rows, GATED, BN, GROUP, SHORT, HALVES)),
        ],
        [TURNERS, 1],
        [REGISTERS, 24],
    )  # fmt: skip
