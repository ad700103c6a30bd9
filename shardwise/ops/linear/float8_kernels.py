"""Kernels of `float8.py`: products with e4m3 weights, of a token or a few by multiply-adds, of more by the matrix unit.

Scales of tiles are factors of the inputs (multiply-adds) or of a step's products (matrix unit), in float32; those of
output channels are factors of the sums. Codes become 16- or 32-bit floats exactly.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.ptx import finish_products, four_e4m3, silu
from shardwise.ops.tensor_memory import prefetch
from shardwise.ops.triton_support import tl, triton


@triton.jit
def _words(pointers, inside, start, words, width):
    return tl.load(
        pointers + start, mask=inside[:, None] & (start + words < width)[None, :], other=0,
        eviction_policy="evict_first",
    )  # fmt: skip


@triton.jit
def _scales(line, start, K, BLOCK_K: tl.constexpr, TILED: tl.constexpr):
    """Of every 16 columns: those that a thread has of a row."""
    column = start + tl.arange(0, BLOCK_K // 16) * 16
    return tl.load(line + column // 128, mask=column < K, other=0.0) if TILED else 1.0


@triton.jit
def _quarters(pointer, start, K, BLOCK_K: tl.constexpr):
    """BLOCK_K inputs as four vectors: those that the first, second, third and last codes of the words meet.

    A thread loads the 16 neighbours that its words meet by itself, eight at a time, as it has 16 codes of a row.
    """
    at = start + tl.arange(0, BLOCK_K // 16)[:, None] * 16 + tl.arange(0, 8)[None, :]
    low = tl.load(pointer + at, mask=at < K, other=0.0)
    high = tl.load(pointer + at + 8, mask=at + 8 < K, other=0.0)
    both = tl.permute(tl.join(low, high), (0, 2, 1)).to(tl.float32)
    even, odd = tl.split(tl.reshape(both, (BLOCK_K // 4, 2, 2)))
    first, third = tl.split(even)
    second, last = tl.split(odd)
    return first, second, third, last


@triton.jit
def _each_word(scale, BLOCK_K: tl.constexpr, TILED: tl.constexpr):
    """[BLOCK_K / 16] -> [BLOCK_K / 4]."""
    return tl.reshape(tl.broadcast_to(scale[:, None], (BLOCK_K // 16, 4)), (BLOCK_K // 4,)) if TILED else scale


@triton.jit
def _add(totals, products, squares, w, u, w_scale, u_scale, x_ptr, norm_ptr, start, K, TOKENS: tl.constexpr,
         BLOCK_K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, TILED: tl.constexpr):  # fmt: skip
    """One tile's part of every sum."""
    codes = four_e4m3(w)
    others = four_e4m3(u) if GATED else codes
    w_scale = _each_word(w_scale, BLOCK_K, TILED)
    u_scale = _each_word(u_scale, BLOCK_K, TILED) if GATED else w_scale
    factors = _quarters(norm_ptr, start, K, BLOCK_K) if NORM else codes
    new_totals = ()
    new_products = ()
    new_squares = ()
    for token in tl.static_range(TOKENS):
        inputs = _quarters(x_ptr + token * K, start, K, BLOCK_K)
        total = totals[token]
        product = products[token]
        square = squares[token]
        for byte in tl.static_range(4):
            x = inputs[byte]
            if NORM:
                square += x * x
                x *= factors[byte]
            total += codes[byte] * (x * w_scale)[None, :]
            if GATED:
                product += others[byte] * (x * u_scale)[None, :]
        new_totals = new_totals + (total,)
        new_products = new_products + (product,)
        new_squares = new_squares + (square,)
    return new_totals, new_products, new_squares


@triton.jit(do_not_specialize=["eps"])
def skinny_float8_kernel(
    x_ptr,  # [T, K]
    word_ptr,  # int32 [N, K / 4], or [2N, K / 4] when GATED: gate rows, then up rows
    scale_ptr,  # TILED: [ceil(N / 128), ceil(K / 128)], else [N]; GATED: twice the rows
    out_ptr,  # [T, N]
    norm_ptr,  # [K]
    bias_ptr,  # [N]
    residual_ptr,  # [T, N]
    N,
    K,
    eps,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    TILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `decode_kernels.skinny_kernel`, of e4m3 weights. BLOCK_N divides 128."""
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    words = tl.arange(0, BLOCK_K // 4)
    width = K // 4
    inside = rows < N
    weights = word_ptr + rows.to(tl.int64)[:, None] * width + words[None, :]
    ups = weights + N.to(tl.int64) * width
    line = scale_ptr + first // 128 * tl.cdiv(K, 128)
    up_line = scale_ptr + (N + first) // 128 * tl.cdiv(K, 128)
    w = ()
    u = ()
    w_scale = ()
    u_scale = ()
    if STAGES == 1:  # the first tile waits in registers, or all WHOLE of a row
        for ahead in tl.static_range(WHOLE if WHOLE > 0 else 1):
            w = w + (_words(weights, inside, ahead * (BLOCK_K // 4), words, width),)
            w_scale = w_scale + (_scales(line, ahead * BLOCK_K, K, BLOCK_K, TILED),)
            u = u + (_words(ups, inside, ahead * (BLOCK_K // 4), words, width) if GATED else 0,)
            u_scale = u_scale + (_scales(up_line, ahead * BLOCK_K, K, BLOCK_K, TILED) if GATED else 1.0,)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    totals = ()
    products = ()
    squares = ()
    for _ in tl.static_range(TOKENS):
        totals = totals + (tl.zeros([BLOCK_N, BLOCK_K // 4], tl.float32),)
        products = products + (tl.zeros([BLOCK_N, BLOCK_K // 4], tl.float32) if GATED else 0.0,)
        squares = squares + (tl.zeros([BLOCK_K // 4], tl.float32) if NORM else 0.0,)
    sums = (totals, products, squares)
    if WHOLE > 0:
        for tile in tl.static_range(WHOLE):
            sums = _add(
                *sums, w[tile], u[tile], w_scale[tile], u_scale[tile], x_ptr, norm_ptr, tile * BLOCK_K, K, TOKENS,
                BLOCK_K, NORM, GATED, TILED,
            )  # fmt: skip
    elif STAGES == 1:
        here = (w[0], u[0], w_scale[0], u_scale[0])
        for start in range(0, K, BLOCK_K):
            next_start = start + BLOCK_K
            following = (
                _words(weights, inside, next_start // 4, words, width),
                _words(ups, inside, next_start // 4, words, width) if GATED else 0,
                _scales(line, next_start, K, BLOCK_K, TILED),
                _scales(up_line, next_start, K, BLOCK_K, TILED) if GATED else 1.0,
            )
            sums = _add(*sums, *here, x_ptr, norm_ptr, start, K, TOKENS, BLOCK_K, NORM, GATED, TILED)
            here = following
    else:
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            tile = _words(weights, inside, start // 4, words, width)
            other = _words(ups, inside, start // 4, words, width) if GATED else 0
            scale = _scales(line, start, K, BLOCK_K, TILED)
            other_scale = _scales(up_line, start, K, BLOCK_K, TILED) if GATED else 1.0
            sums = _add(
                *sums, tile, other, scale, other_scale, x_ptr, norm_ptr, start, K, TOKENS, BLOCK_K, NORM, GATED, TILED
            )
    for token in tl.static_range(TOKENS):
        y = tl.sum(sums[0][token], 1)
        if not TILED:
            y *= tl.load(scale_ptr + rows, mask=inside, other=0.0)
        norm = tl.rsqrt(tl.sum(sums[2][token], 0) / K + eps) if NORM else 1.0
        y *= norm
        if BIAS:
            y += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.sum(sums[1][token], 1) * norm
            if not TILED:
                up *= tl.load(scale_ptr + N + rows, mask=inside, other=0.0)
            y = silu(y) * up
        if RESIDUAL:
            y += tl.load(residual_ptr + token * N + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * N + rows, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product(acc, w, x, scale, TILED: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + W x^T times the step's scale; W e4m3 [BN, BK], x [BT, BK]."""
    if INTERPRET:
        found = tl.dot(w.to(tl.float32), tl.trans(x).to(tl.float32), input_precision="ieee")
        return acc + (found * scale if TILED else found)
    # By way of float32: the hardware converts pairs to that and from that, but single fp16 numbers to bf16.
    left = w.to(tl.float32).to(x.dtype)
    if TILED:
        return acc + tl.dot(left, tl.trans(x)) * scale
    acc = tl.dot(left, tl.trans(x), acc)
    finish_products()
    return acc


@triton.jit
def parts_at(part_ptr, tile, SPLITS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr):
    """Where the first part of a tile lies; the next ones follow."""
    place = tl.arange(0, BN)[:, None] * BT + tl.arange(0, BT)[None, :]
    return part_ptr + tile.to(tl.int64) * SPLITS * BN * BT + place


@triton.jit
def sum_of_parts(parts, SPLITS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr):
    total = tl.load(parts, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * BN * BT, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["tokens"])
def few_float8_kernel(
    x, w, code_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, part_ptr, count_ptr, tokens, N, K,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, TILED: tl.constexpr, AHEAD: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN outputs of all tokens, or a part of K's share of them; the last part to arrive adds up all, in their order.

    x      descriptor of [T, K] in tiles [BT, BK]
    w      descriptor of the codes in tiles [BN / 2 if GATED else BN, BK]; code_ptr, their address
    GATED  a tile has BN / 2 gate rows and the up rows that belong to them, whose products lie behind theirs
    AHEAD  lines of 128 bytes of each weight row that are asked for before the tokens are there
    BK     at most 128 where TILED
    """
    ROWS: tl.constexpr = BN // 2 if GATED else BN
    first = tl.program_id(0) * ROWS
    n = first + tl.arange(0, ROWS)
    steps = tl.cdiv(tl.cdiv(K, BK), SPLITS)
    begin = tl.program_id(1) * steps * BK
    if AHEAD > 0:
        column = begin + tl.arange(0, AHEAD) * 128
        lines = tl.where(n < N, n, 0).to(tl.int64)[:, None] * K + tl.where(column < K, column, 0)[None, :]
        prefetch(code_ptr + lines, INTERPRET)
        if GATED:
            prefetch(code_ptr + N.to(tl.int64) * K + lines, INTERPRET)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    line = scale_ptr + first // 128 * tl.cdiv(K, 128)
    up_line = scale_ptr + (N + first) // 128 * tl.cdiv(K, 128)
    acc = tl.zeros((ROWS, BT), dtype=tl.float32)
    up = tl.zeros((ROWS, BT), dtype=tl.float32)
    for k in tl.range(begin, min(begin + steps * BK, K), BK, num_stages=STAGES):
        inputs = x.load([0, k])
        scale = tl.load(line + k // 128) if TILED else 1.0
        acc = _product(acc, w.load([first, k]), inputs, scale, TILED, INTERPRET)
        if GATED:
            scale = tl.load(up_line + k // 128) if TILED else 1.0
            up = _product(up, w.load([N + first, k]), inputs, scale, TILED, INTERPRET)
    if SPLITS > 1:
        tile = tl.program_id(0)
        parts = parts_at(part_ptr, tile, SPLITS, ROWS, BT)
        up_parts = parts_at(part_ptr, tl.num_programs(0) + tile, SPLITS, ROWS, BT)
        tl.store(parts + tl.program_id(1) * ROWS * BT, acc)
        if GATED:
            tl.store(up_parts + tl.program_id(1) * ROWS * BT, up)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        tl.store(count_ptr + tile, 0)
        acc = sum_of_parts(parts, SPLITS, ROWS, BT)
        if GATED:
            up = sum_of_parts(up_parts, SPLITS, ROWS, BT)
    t = tl.arange(0, BT)
    inside = (n < N)[:, None] & (t < tokens)[None, :]
    if not TILED:
        acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if not TILED:
            up *= tl.load(scale_ptr + N + n, mask=n < N, other=0.0)[:, None]
        acc = silu(acc) * up
    at = t[None, :] * N + n[:, None]
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
