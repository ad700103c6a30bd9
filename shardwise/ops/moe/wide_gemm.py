"""Grouped GEMM for many tokens an expert on Hopper: one warp brings the tiles, two warpgroups multiply them.

Loads run ahead of the products, also beyond the end of a tile, so that storing its results costs no wait for memory.
Written in Gluon, as Triton splits no loop on Hopper by itself; `grouped_gemm` does the same for what this does not take
and in the interpreter.
"""

from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.triton_support import tl


@jit
def place(index, blocks, per_block, GROUP: tl.constexpr, SHORT: tl.constexpr):
    """As in `grouped_gemm`; with SHORT, a program's tiles are of the blocks in turn, so that all get short ones."""
    group = index // (GROUP * per_block)
    within = index - group * (GROUP * per_block)
    size = gl.minimum(blocks - group * GROUP, GROUP)
    tile = within // size
    return group * GROUP + (within + tile if SHORT > 0 else within) % size, tile


@jit
def _bring(
    x, w, left, right, full, empty, count, row, start, steps, out_rows, GATED: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The steps of one tile, each when its stage has been emptied; the first is the program's `count`th."""
    BYTES: tl.constexpr = (BT + (2 * BN if GATED else BN)) * BK * x.dtype.primitive_bitwidth // 8
    for step in range(steps):
        stage, k = count % STAGES, step * BK
        gl.nvidia.hopper.mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
        there = full.index(stage)
        gl.nvidia.hopper.mbarrier.expect(there, BYTES)
        gl.nvidia.hopper.tma.async_copy_global_to_shared(x, [start, k], there, left.index(stage))
        weights = right.index(stage)
        gl.nvidia.hopper.tma.async_copy_global_to_shared(w, [row, k], there, weights.slice(0, BN, 0))
        if GATED:
            gl.nvidia.hopper.tma.async_copy_global_to_shared(w, [row + out_rows, k], there, weights.slice(BN, BN, 0))
        count += 1


@jit
def whole_tiles(tiles, HALVES: tl.constexpr):
    """Tiles that are not halved: all, or all but those of a last round that has work for no more than half of the
    programs; there, two programs share a tile.
    """
    rest = tiles % gl.num_programs(0)
    return tiles - rest if HALVES and 2 * rest <= gl.num_programs(0) else tiles


@jit
def _load(
    x, w, left, right, full, empty, block_ptr, columns, out_rows,
    GATED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, SHORT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Bring all tiles of the program, in their order."""
    blocks, per_block, steps = gl.load(block_ptr), gl.cdiv(out_rows, BN), gl.cdiv(columns, BK)
    whole = whole_tiles(blocks * per_block, HALVES)
    count = 0
    for index in range(gl.program_id(0), whole, gl.num_programs(0)):
        block, tile = place(index, blocks, per_block, GROUP, SHORT)
        row = gl.load(block_ptr + 1 + 3 * block) * (out_rows * (2 if GATED else 1)) + tile * BN
        start = gl.load(block_ptr + 2 + 3 * block)
        _bring(x, w, left, right, full, empty, count, row, start, steps, out_rows, GATED, BN, BT, BK, STAGES)
        count += steps
    if HALVES:
        index = whole + gl.program_id(0) // 2
        if index < blocks * per_block:  # twice the rows that are needed, as the descriptor has them
            block, tile = place(index, blocks, per_block, GROUP, SHORT)
            row = gl.load(block_ptr + 1 + 3 * block) * out_rows + tile * BN + gl.program_id(0) % 2 * (BN // 2)
            start = gl.load(block_ptr + 2 + 3 * block)
            _bring(x, w, left, right, full, empty, count, row, start, steps, out_rows, GATED, BN, BT, BK, STAGES)


@jit
def _products(
    left, right, full, empty, count, steps, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH] sums of a tile over all steps, the first of which is the program's `count`th."""
    acc = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    for step in range(steps):
        stage = count % STAGES
        gl.nvidia.hopper.mbarrier.wait(full.index(stage), count // STAGES & 1)
        tokens, weights = left.index(stage).slice(0, ROWS, 0), right.index(stage).slice(0, WIDTH, 0).permute((1, 0))
        acc = gl.nvidia.hopper.warpgroup_mma(tokens, weights, acc, is_async=True)
        acc = gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        if step > 0:  # the product before has read its stage, in both warpgroups
            gl.thread_barrier()
            gl.nvidia.hopper.mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))
        count += 1
    acc = gl.nvidia.hopper.warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    gl.thread_barrier()
    gl.nvidia.hopper.mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))
    return acc


@jit
def finish(
    acc, out_ptr, sorted_ptr, quant_ptr, factor, start, stop, first_row, out_rows,
    BN: tl.constexpr, GATED: tl.constexpr, BY_PAIR: tl.constexpr, SCALED: tl.constexpr, DIVIDE: tl.constexpr,
    MULTIPLY: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """A tile's results from its sums [tokens, BN], or [tokens, up and gate rows]."""
    ROWS: tl.constexpr = acc.shape[0]
    if SCALED:
        acc *= factor
    if GATED:
        up, gate = gl.split(gl.permute(gl.reshape(acc, (ROWS, 2, BN)), (0, 2, 1)))
        value = up * gate / (1.0 + gl.exp(-gate))
    else:
        value = acc
    if DIVIDE:
        value = gl.minimum(gl.maximum(value / gl.load(quant_ptr), -448.0), 448.0)
    elif MULTIPLY:
        value = gl.minimum(gl.maximum(value * gl.load(quant_ptr), -448.0), 448.0)
    value = gl.convert_layout(value.to(out_ptr.dtype.element_ty), OUT)
    position = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    n = first_row + gl.arange(0, BN, layout=gl.SliceLayout(0, OUT))
    row = gl.load(sorted_ptr + position, mask=position < stop, other=0) if BY_PAIR else position
    at = out_ptr + row.to(gl.int64)[:, None] * out_rows + n[None, :]
    gl.store(at, value, mask=(position < stop)[:, None] & (n < out_rows)[None, :])


@jit
def _tile(
    left, right, full, empty, count, steps, out_ptr, sorted_ptr, quant_ptr, factor, start, stop, first_row, out_rows,
    ROWS: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, BY_PAIR: tl.constexpr,
    SCALED: tl.constexpr, DIVIDE: tl.constexpr, MULTIPLY: tl.constexpr, ACC: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """The results of ROWS tokens and BN rows of an expert."""
    acc = _products(left, right, full, empty, count, steps, ROWS, 2 * BN if GATED else BN, STAGES, ACC)
    finish(
        acc, out_ptr, sorted_ptr, quant_ptr, factor, start, stop, first_row, out_rows, BN, GATED, BY_PAIR, SCALED,
        DIVIDE, MULTIPLY, OUT,
    )  # fmt: skip


@jit
def _factor(scale_ptr, factor_ptr, block_ptr, block, SCALED: tl.constexpr, FACTORED: tl.constexpr):
    """What a block's products are multiplied with."""
    factor = 1.0
    if SCALED:
        factor = gl.load(scale_ptr + gl.load(block_ptr + 1 + 3 * block))
        if FACTORED:
            factor *= gl.load(factor_ptr)
    return factor


@jit
def _multiply(
    left, right, full, empty, out_ptr, sorted_ptr, block_ptr, scale_ptr, factor_ptr, quant_ptr, columns, out_rows,
    GATED: tl.constexpr, BY_PAIR: tl.constexpr, SCALED: tl.constexpr, FACTORED: tl.constexpr, DIVIDE: tl.constexpr,
    MULTIPLY: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    SHORT: tl.constexpr, HALVES: tl.constexpr, ACC: tl.constexpr, SHORT_ACC: tl.constexpr,
    HALF_ACC: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """The products of all steps, and each tile's results."""
    blocks, per_block, steps = gl.load(block_ptr), gl.cdiv(out_rows, BN), gl.cdiv(columns, left.shape[2])
    whole = whole_tiles(blocks * per_block, HALVES)
    count = 0
    for index in range(gl.program_id(0), whole, gl.num_programs(0)):
        block, tile = place(index, blocks, per_block, GROUP, SHORT)
        start, stop = gl.load(block_ptr + 2 + 3 * block), gl.load(block_ptr + 3 + 3 * block)
        factor = _factor(scale_ptr, factor_ptr, block_ptr, block, SCALED, FACTORED)
        if SHORT > 0 and stop - start <= SHORT:
            _tile(
                left, right, full, empty, count, steps, out_ptr, sorted_ptr, quant_ptr, factor, start, stop, tile * BN,
                out_rows, SHORT, BN, STAGES, GATED, BY_PAIR, SCALED, DIVIDE, MULTIPLY, SHORT_ACC, OUT,
            )  # fmt: skip
        else:
            _tile(
                left, right, full, empty, count, steps, out_ptr, sorted_ptr, quant_ptr, factor, start, stop, tile * BN,
                out_rows, BT, BN, STAGES, GATED, BY_PAIR, SCALED, DIVIDE, MULTIPLY, ACC, OUT,
            )  # fmt: skip
        count += steps
    if HALVES:
        index = whole + gl.program_id(0) // 2
        if index < blocks * per_block:
            block, tile = place(index, blocks, per_block, GROUP, SHORT)
            start, stop = gl.load(block_ptr + 2 + 3 * block), gl.load(block_ptr + 3 + 3 * block)
            factor = _factor(scale_ptr, factor_ptr, block_ptr, block, SCALED, FACTORED)
            _tile(
                left, right, full, empty, count, steps, out_ptr, sorted_ptr, quant_ptr, factor, start, stop,
                tile * BN + gl.program_id(0) % 2 * (BN // 2), out_rows, BT, BN // 2, STAGES, GATED, BY_PAIR, SCALED,
                DIVIDE, MULTIPLY, HALF_ACC, OUT,
            )  # fmt: skip


@jit
def wide_gemm(
    x, w, out_ptr, sorted_ptr, block_ptr, scale_ptr, factor_ptr, quant_ptr, columns, out_rows,
    GATED: tl.constexpr, BY_PAIR: tl.constexpr, SCALED: tl.constexpr, FACTORED: tl.constexpr, DIVIDE: tl.constexpr,
    MULTIPLY: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, SHORT: tl.constexpr, HALVES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (token block, n tile); arguments as in `grouped_gemm`, x and w descriptors of two dimensions.

    GATED   silu(gate) * up; otherwise the products are the results
    SCALED  products are multiplied with scale_ptr[expert]
    DIVIDE  results are divided by quant_ptr[0], or with MULTIPLY multiplied with it, and stored as e4m3
    SHORT   a block of at most so many tokens is computed as one of so many; 0: none is
    HALVES  two programs share a tile in a last round that has work for no more than half of them; not with GATED
    """
    WIDTH: tl.constexpr = 2 * BN if GATED else BN
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    ACC: tl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, WIDTH, 256 // BITS]
    )
    # Both warpgroups on the same rows; up and gate rows of a result in one of them.
    SHORT_ACC: tl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, gl.num_warps() // 4], instr_shape=[16, BN // 2, 256 // BITS]
    )
    HALF_ACC: tl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BN // 2, 256 // BITS]
    )
    OUT: tl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    SHARED: tl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    left = gl.allocate_shared_memory(x.dtype, [STAGES, BT, BK], SHARED)
    right = gl.allocate_shared_memory(x.dtype, [STAGES, WIDTH, BK], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], gl.nvidia.hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], gl.nvidia.hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        gl.nvidia.hopper.mbarrier.init(full.index(stage), count=1)
        gl.nvidia.hopper.mbarrier.init(empty.index(stage), count=1)
    gl.nvidia.hopper.fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_multiply, (
                left, right, full, empty, out_ptr, sorted_ptr, block_ptr, scale_ptr, factor_ptr, quant_ptr, columns,
                out_rows, GATED, BY_PAIR, SCALED, FACTORED, DIVIDE, MULTIPLY, BN, BT, STAGES, GROUP, SHORT,
                HALVES, ACC, SHORT_ACC, HALF_ACC, OUT,
            )),
            (_load, (
                x, w, left, right, full, empty, block_ptr, columns, out_rows, GATED, BN, BT, BK, STAGES, GROUP, SHORT,
                HALVES,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip
