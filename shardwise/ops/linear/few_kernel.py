"""Products of two to eight tokens with weights read once: sixteen rows a program, on the matrix unit.

A program's warps are the first dimension of all its tensors. Each takes every WARPS-th tile of 64 columns, DEPTH of
them on their way from memory straight into the registers from which the matrix unit reads. A lane loads eight columns
of a row at once; in which order a product adds its columns up is free, so x is taken in the order that this gives.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit, mma_v2
from shardwise.ops.ptx import keep_loads_above
from shardwise.ops.triton_support import tl

TOKENS = tl.constexpr(8)  # columns of a product of the matrix unit


@jit
def _dimension(size: tl.constexpr, dim: tl.constexpr, LAYOUT: tl.constexpr):
    """0 to size - 1 along one of a layout's six dimensions."""
    FIVE: tl.constexpr = gl.SliceLayout(5, LAYOUT) if dim != 5 else LAYOUT
    FOUR: tl.constexpr = gl.SliceLayout(4, FIVE) if dim != 4 else FIVE
    THREE: tl.constexpr = gl.SliceLayout(3, FOUR) if dim != 3 else FOUR
    TWO: tl.constexpr = gl.SliceLayout(2, THREE) if dim != 2 else THREE
    ONE: tl.constexpr = gl.SliceLayout(1, TWO) if dim != 1 else TWO
    value = gl.arange(0, size, layout=gl.SliceLayout(0, ONE) if dim != 0 else ONE)
    for place in gl.static_range(6):
        if place != dim:
            value = gl.expand_dims(value, place)
    return value


@jit
def _rows(at, inside, tile, tiles):
    """A tile of weights for each warp, [W, 2, 8, 2, 4, 8]; zeros where there is none any more."""
    return gl.load(at, mask=inside & (tile < tiles), other=0.0, eviction_policy="evict_first")


@jit
def _left(tile, LEFT: tl.constexpr):
    """[W, 2, 8, 2, 4, 8] to [W, 16, 64], columns in the matrix unit's order."""
    parts = gl.reshape(tile, (tile.shape[0], 2, 8, 2, 4, 2, 2, 2))
    whole = gl.reshape(gl.permute(parts, (0, 1, 2, 3, 5, 6, 4, 7)), (tile.shape[0], 16, 64))
    return gl.convert_layout(whole, LEFT)


@jit
def _right(x, RIGHT: tl.constexpr):
    """[W, 1, 8, 2, 4, 8] to [W, 64, 8], rows in the order of `_left`'s columns."""
    parts = gl.reshape(x, (x.shape[0], TOKENS, 2, 4, 2, 2, 2))
    whole = gl.reshape(gl.permute(parts, (0, 2, 4, 5, 3, 6, 1)), (x.shape[0], 64, TOKENS))
    return gl.convert_layout(whole, RIGHT)


@jit(do_not_specialize=["eps", "norm_bias", "tokens"])
def few_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K], or [2N, K] when GATED: gate rows, then up rows
    out_ptr,  # [T, N]
    norm_ptr,  # [K]
    bias_ptr,  # [N]
    residual_ptr,  # [T, N]
    tokens, N, K, eps, norm_bias,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, DEPTH: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    # [warp, half of the rows, row, half of the columns, lane, column]
    SIX: tl.constexpr = gl.BlockedLayout(
        [1, 2, 1, 2, 1, 8], [1, 1, 8, 1, 4, 1], [WARPS, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    ONE: tl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 2, 1, 8], [1, 1, 8, 1, 4, 1], [WARPS, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )  # x's
    tile = _dimension(WARPS, 0, SIX)
    tiles = K // 64
    row = gl.program_id(0) * 16 + _dimension(2, 1, SIX) * 8 + _dimension(8, 2, SIX)
    column = tile * 64 + _dimension(2, 3, SIX) * 32 + _dimension(4, 4, SIX) * 8 + _dimension(8, 5, SIX)
    inside = row < N
    at = weight_ptr + row.to(gl.int64) * K + column
    up_at = at + N.to(gl.int64) * K
    words = ()
    ups = ()
    for ahead in gl.static_range(DEPTH):
        words = words + (_rows(at + ahead * (WARPS * 64), inside, tile + ahead * WARPS, tiles),)
        if GATED:
            ups = ups + (_rows(up_at + ahead * (WARPS * 64), inside, tile + ahead * WARPS, tiles),)
    OUT: tl.constexpr = gl.SliceLayout(0, ACC)
    out_row = gl.program_id(0) * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, OUT))
    bias = 0.0
    if BIAS:
        bias = gl.load(bias_ptr + out_row, mask=out_row < N, other=0.0).to(gl.float32)[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    out_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, OUT))
    written = (out_row < N)[:, None] & (out_token < tokens)[None, :]
    place = out_token[None, :].to(gl.int64) * N + out_row[:, None]
    residual = 0.0
    if RESIDUAL:
        residual = gl.load(residual_ptr + place, mask=written, other=0.0).to(gl.float32)
    token = _dimension(8, 2, ONE)
    tile_x = _dimension(WARPS, 0, ONE)
    column_x = tile_x * 64 + _dimension(2, 3, ONE) * 32 + _dimension(4, 4, ONE) * 8 + _dimension(8, 5, ONE)
    x_at = x_ptr + token * K + column_x
    norm_at = norm_ptr + column_x if NORM else x_at
    there = token < tokens
    acc = gl.zeros([WARPS, 16, TOKENS], gl.float32, ACC)
    acc_up = gl.zeros([WARPS, 16, TOKENS], gl.float32, ACC)
    squares = gl.zeros([WARPS, 1, TOKENS, 2, 4, 8], gl.float32, ONE)
    for _ in range(0, tiles, WARPS * DEPTH):
        next_words = ()
        next_ups = ()
        for ahead in gl.static_range(DEPTH):
            here = tile_x + ahead * WARPS < tiles
            x = gl.load(x_at + ahead * (WARPS * 64), mask=there & here, other=0.0)
            if NORM:
                wide = x.to(gl.float32)
                squares += wide * wide
                norm = gl.load(norm_at + ahead * (WARPS * 64), mask=here, other=0.0).to(gl.float32) + norm_bias
                x = (wide * norm).to(x.dtype)
            right = _right(x, RIGHT)
            acc = mma_v2(_left(words[ahead], LEFT), right, acc)
            later = (ahead + DEPTH) * WARPS
            next_words = next_words + (_rows(at + later * 64, inside, tile + later, tiles),)
            if GATED:
                acc_up = mma_v2(_left(ups[ahead], LEFT), right, acc_up)
                next_ups = next_ups + (_rows(up_at + later * 64, inside, tile + later, tiles),)
            keep_loads_above()
        words = next_words
        ups = next_ups
        at += DEPTH * WARPS * 64
        up_at += DEPTH * WARPS * 64
        x_at += DEPTH * WARPS * 64
        norm_at += DEPTH * WARPS * 64
        tile += DEPTH * WARPS
        tile_x += DEPTH * WARPS
    y = gl.sum(acc, 0)
    scale = 1.0
    if NORM:
        total = gl.sum(gl.sum(gl.sum(gl.sum(gl.sum(squares, 5), 4), 3), 1), 0)
        scale = gl.convert_layout(1.0 / gl.sqrt(total / K + eps), gl.SliceLayout(0, OUT))[None, :]
    y = y * scale + bias
    if GATED:
        y = y / (1.0 + gl.exp(-y)) * (gl.sum(acc_up, 0) * scale)
    gl.store(out_ptr + place, (y + residual).to(out_ptr.dtype.element_ty), mask=written)
