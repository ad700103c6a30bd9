"""Kernels of `decode.py` for MXFP4 weights: a warp for 16 rows, its codes straight from memory to the matrix unit.

A program's warps are the first dimension of all its tensors. Each reads tiles of 64 columns of one expert, DEPTH ahead,
into the registers from which the matrix unit takes the unpacked weights; the token is one of eight equal columns of its
product. Only the sums of warps that share rows pass through shared memory.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit, mma_v2
from shardwise.ops.moe.decode_kernels import routed_slot, store_sum
from shardwise.ops.moe.mxfp4_pieces import unpack_slabs
from shardwise.ops.ptx import keep_loads_above
from shardwise.ops.triton_support import await_and_trigger, tl

COLUMNS = tl.constexpr(8)  # of a product of the matrix unit


@jit
def _words(word_at, k, stop):
    """A tile's words for each warp; where there is no tile any more, anything."""
    there = gl.expand_dims(gl.expand_dims(gl.expand_dims(k < stop, 1), 2), 3)
    return gl.load(word_at, mask=there, eviction_policy="evict_first")


@jit
def _scales(scale_at, k, stop):
    return gl.load(scale_at, mask=(k < stop)[:, None], other=0)


@jit
def _x(x_at, column, k, stop, columns, EVEN: tl.constexpr):
    """A tile's columns of x for each warp, zeros where there is no tile any more."""
    there = gl.expand_dims(gl.expand_dims(k < stop, 1), 2)
    if not EVEN:
        there = there & (gl.expand_dims(gl.expand_dims(k * 64, 1), 2) + column < columns)
    return gl.load(x_at, mask=there, other=0.0)


@jit
def _step(
    acc, words, scales, word_at, scale_at, x_at, column, k, k_x, stop, stop_x, columns,
    AHEAD: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr, LEFT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the products of tile k + AHEAD, whose weights are here, and load those DEPTH tiles behind it."""
    x = _x(x_at + AHEAD * 64, column, k_x + AHEAD, stop_x, columns, EVEN)
    weights = unpack_slabs(words, scales, (words.shape[0], 16, 64), WORDS, LEFT, INTERPRET)
    acc = mma_v2(weights, x, acc)
    words = _words(word_at + (AHEAD + DEPTH) * 512, k + AHEAD + DEPTH, stop)
    scales = _scales(scale_at + (AHEAD + DEPTH) * 32, k + AHEAD + DEPTH, stop)
    keep_loads_above()
    return acc, words, scales


@jit
def _product(
    word_ptr, scale_ptr, x_ptr, expert, slab, x_row, first, stop, count, tiles_n, tiles_k, columns,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr, ACC: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """[W, 16, COLUMNS] sums of each warp over its tiles from `first` to `stop`, at most `count`.

    expert, slab, x_row, first and stop are [W].
    """
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    ROWS: tl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, WORDS))
    ROW: tl.constexpr = gl.SliceLayout(0, ROWS)
    LANE: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WORDS)))
    STEPS: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
    OF_X: tl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, RIGHT))
    row = gl.arange(0, 8, layout=ROW)
    lane = gl.arange(0, 4, layout=LANE)
    step = gl.arange(0, 4, layout=STEPS)
    tile = (expert.to(gl.int64) * tiles_n + slab // 4) * tiles_k + first
    rows = (tile * 512 + slab % 4 * 128)[:, None] + row[None, :] * 16
    lanes = gl.expand_dims(gl.expand_dims(gl.expand_dims(lane * 4, 0), 1), 3)
    steps = gl.expand_dims(gl.expand_dims(gl.expand_dims(step, 0), 1), 2)
    word_at = word_ptr + (gl.expand_dims(gl.expand_dims(rows, 2), 3) + lanes + steps)
    scale_at = scale_ptr + ((tile * 32 + slab % 4 * 8)[:, None] + row[None, :])
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))
    column = gl.expand_dims(gl.expand_dims(column, 0), 2)
    same = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT))) * 0
    from_x = gl.convert_layout(x_row + first * 64, OF_X)
    # Added up one by one: a thread's columns then differ by constants, and share the registers of their address.
    x_at = x_ptr + gl.expand_dims(gl.expand_dims(from_x, 1), 2) + column + gl.expand_dims(gl.expand_dims(same, 0), 1)
    k = first
    k_x = gl.convert_layout(first, OF_X)
    stop_x = gl.convert_layout(stop, OF_X)
    words = ()
    scales = ()
    for ahead in gl.static_range(DEPTH):
        words = words + (_words(word_at + ahead * 512, k + ahead, stop),)
        scales = scales + (_scales(scale_at + ahead * 32, k + ahead, stop),)
    acc = gl.zeros([words[0].shape[0], 16, COLUMNS], gl.float32, ACC)
    for _ in range(0, count, DEPTH):
        next_words = ()
        next_scales = ()
        for ahead in gl.static_range(DEPTH):
            acc, word, scale = _step(
                acc, words[ahead], scales[ahead], word_at, scale_at, x_at, column, k, k_x, stop, stop_x, columns,
                ahead, DEPTH, EVEN, WORDS, LEFT, INTERPRET,
            )  # fmt: skip
            next_words = next_words + (word,)
            next_scales = next_scales + (scale,)
        words = next_words
        scales = next_scales
        word_at += DEPTH * 512
        scale_at += DEPTH * 32
        x_at += DEPTH * 64
        k += DEPTH
        k_x += DEPTH
    return acc


@jit(do_not_specialize=["scale", "alpha", "limit"])
def packed_up(
    x_ptr, logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, out_ptr, size, hidden, experts, logit_row, scale,
    alpha, limit, word_ptr, scale_ptr, bias_ptr, tiles_n, tiles_k,
    TOP_K: tl.constexpr, E_BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr, CLAMPED: tl.constexpr,
    PDL: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, WARPS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """64 packed rows of one pair's activation, a slab's first eight of them gates; WARPS / 4 warps share 16 rows."""
    ACC: tl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    WORDS: tl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    OF_WARP: tl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WORDS)))
    BIASES: tl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    EXPERTS: tl.constexpr = gl.BlockedLayout([E_BLOCK // 32], [32], [WARPS], [0])  # all of them in every warp
    pair = gl.program_id(1)
    token = pair // TOP_K
    e = gl.arange(0, E_BLOCK, layout=EXPERTS)
    slot = routed_slot(
        logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, pair, e, logit_row, experts, scale,
        TOP_K, NORMALIZE, PADDED, PDL,
    )  # fmt: skip
    if slot >= 0:
        place = gl.arange(0, 64, layout=BIASES)
        bias = gl.load(bias_ptr + (slot * tiles_n + gl.program_id(0)) * 64 + place)
        warp = gl.arange(0, WARPS, layout=OF_WARP)
        slab = gl.program_id(0) * 4 + warp % 4
        each = gl.cdiv(tiles_k, WARPS // 4)
        first = warp // 4 * each
        stop = gl.minimum(first + each, tiles_k)
        acc = _product(
            word_ptr, scale_ptr, x_ptr, slab * 0 + slot, slab, slab * 0 + token * hidden, first, stop, each,
            tiles_n, tiles_k, hidden, DEPTH, EVEN, INTERPRET, ACC, WORDS,
        )  # fmt: skip
        # Columns are equal: one of them counts. [halves of K, slab, gate or up, row] to [slab, gate or up, row].
        sums = gl.sum(gl.reshape(gl.max(acc, 2), (WARPS // 4, 4, 2, 8)), 0)
        sums += gl.convert_layout(gl.reshape(bias, (4, 2, 8)), sums.type.layout if not INTERPRET else 0)
        gate, up = gl.split(gl.permute(sums, (0, 2, 1)))
        OUT: tl.constexpr = gate.type.layout if not INTERPRET else 0
        slabs = gl.arange(0, 4, layout=gl.SliceLayout(1, OUT))
        row = gl.arange(0, 8, layout=gl.SliceLayout(0, OUT))
        if CLAMPED:
            gate = gl.minimum(gate, limit)
            up = gl.minimum(gl.maximum(up, -limit), limit) + 1.0
        value = up * gate / (1.0 + gl.exp(-alpha * gate))
        rows = (gl.program_id(0) * 4 + slabs)[:, None] * 8 + row[None, :]
        out = out_ptr + pair.to(gl.int64) * size + rows
        gl.store(out, value.to(out_ptr.dtype.element_ty), mask=rows < size)


@jit
def dealt(id_ptr, token, warp, CHOICES: tl.constexpr, WARPS: tl.constexpr):
    """A token's local experts dealt to the warps: how many they are, warps for each, and of every warp its expert, its
    pair and whether it has any."""
    count = 0
    for choice in gl.static_range(CHOICES):
        count += (gl.load(id_ptr + token * CHOICES + choice) >= 0).to(gl.int32)
    parts = WARPS // gl.maximum(count, 1)
    expert = warp * 0
    pair = warp * 0 + token * CHOICES
    held = warp < 0
    number = 0
    for choice in gl.static_range(CHOICES):  # a warp takes the local choice of its own number
        slot = gl.load(id_ptr + token * CHOICES + choice)
        mine = (warp // parts == number) & (slot >= 0)
        expert = gl.where(mine, slot, expert)
        pair = gl.where(mine, token * CHOICES + choice, pair)
        held = held | mine
        number += (slot >= 0).to(gl.int32)
    return count, parts, expert, pair, held


@jit
def packed_down(
    inner_ptr, id_ptr, route_ptr, residual_ptr, out_ptr, hidden, size, word_ptr, scale_ptr, bias_ptr, tiles_n, tiles_k,
    CHOICES: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    WARPS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sixteen rows of one token's sum. Its local experts are dealt to the warps, as many to each."""
    ACC: tl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    WORDS: tl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    OF_WARP: tl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WORDS)))
    await_and_trigger(PDL)
    token = gl.program_id(1)
    warp = gl.arange(0, WARPS, layout=OF_WARP)
    count, parts, expert, pair, held = dealt(id_ptr, token, warp, CHOICES, WARPS)
    each = gl.cdiv(tiles_k, parts)
    first = warp % parts * each
    stop = gl.where(held, gl.minimum(first + each, tiles_k), first)
    acc = _product(
        word_ptr, scale_ptr, inner_ptr, expert, warp * 0 + gl.program_id(0), pair * size, first, stop,
        each if count > 0 else 0, tiles_n, tiles_k, size, DEPTH, EVEN, INTERPRET, ACC, WORDS,
    )  # fmt: skip
    OF_SUM: tl.constexpr = gl.SliceLayout(2, ACC)
    weight = gl.convert_layout(gl.load(route_ptr + pair), gl.SliceLayout(1, OF_SUM))
    expert = gl.convert_layout(expert, gl.SliceLayout(1, OF_SUM))
    leads = gl.convert_layout((first == 0) & (stop > first), gl.SliceLayout(1, OF_SUM))
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, OF_SUM))
    biases = bias_ptr + ((expert * tiles_n * 4 + gl.program_id(0)) * 16)[:, None] + row[None, :]
    bias = gl.load(biases, mask=leads[:, None], other=0.0)
    total = gl.sum((gl.max(acc, 2) + bias) * weight[:, None], 0)
    rows = gl.program_id(0) * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, OF_SUM))
    store_sum(total, token, rows, rows < hidden, residual_ptr, out_ptr, hidden, RESIDUAL)
