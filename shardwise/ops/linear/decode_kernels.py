"""Kernels of `decode.py`: matrix-vector products with all that stands around them, and the activation by itself."""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.ptx import keep_loads_above
from shardwise.ops.triton_support import tl, triton


@triton.jit
def _tile(pointers, inside, here, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=inside[:, None] & here[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x_ptr, norm_ptr, K, columns, TOKENS: tl.constexpr, NORM: tl.constexpr):
    """Some columns of every token and, behind them, of the norm's weights, as they lie in memory."""
    here = columns < K
    loads = ()
    for token in tl.static_range(TOKENS):
        loads = loads + (tl.load(x_ptr + token * K + columns, mask=here, other=0.0),)
    if NORM:
        loads = loads + (tl.load(norm_ptr + columns, mask=here, other=0.0),)
    return loads


@triton.jit
def _add(totals, products, squares, w, u, inputs,
         TOKENS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """One tile's part of every sum."""
    w = w.to(tl.float32)
    u = u.to(tl.float32)
    new_totals = ()
    new_products = ()
    new_squares = ()
    for token in tl.static_range(TOKENS):
        x = inputs[token].to(tl.float32)
        new_squares = new_squares + (squares[token] + x * x if NORM else squares[token],)
        if NORM:
            x *= inputs[TOKENS].to(tl.float32)
        new_totals = new_totals + (totals[token] + w * x[None, :],)
        new_products = new_products + (products[token] + u * x[None, :] if GATED else products[token],)
    return new_totals, new_products, new_squares


@triton.jit
def _sum_whole(totals, products, squares, w, u, x_ptr, norm_ptr, K, columns, TOKENS: tl.constexpr,
               BLOCK_K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """The sums of rows whose tiles `w` and `u` are all there or on their way."""
    WHOLE: tl.constexpr = len(w)
    inputs = ()
    for ahead in tl.static_range(WHOLE):
        inputs = inputs + (_inputs(x_ptr, norm_ptr, K, ahead * BLOCK_K + columns, TOKENS, NORM),)
    keep_loads_above()
    for ahead in tl.static_range(WHOLE):
        totals, products, squares = _add(
            totals, products, squares, w[ahead], u[ahead] if GATED else w[ahead], inputs[ahead], TOKENS, NORM, GATED
        )  # fmt: skip
    return totals, products, squares


@triton.jit
def _sum_ahead(totals, products, squares, w, u, weights, ups, inside, x_ptr, norm_ptr, K, columns,
               TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr, NORM: tl.constexpr,
               GATED: tl.constexpr):  # fmt: skip
    """The sums of rows of which the first tile is on its way; each next one waits in registers."""
    tile = w
    other = u if GATED else tile
    for start in range(0, K, BLOCK_K):
        following = start + BLOCK_K + columns < K
        next_tile = _tile(weights + start + BLOCK_K, inside, following, False)
        next_other = _tile(ups + start + BLOCK_K, inside, following, False) if GATED else next_tile
        if EARLY:
            keep_loads_above()
        totals, products, squares = _add(
            totals, products, squares, tile, other, _inputs(x_ptr, norm_ptr, K, start + columns, TOKENS, NORM),
            TOKENS, NORM, GATED,
        )  # fmt: skip
        tile = next_tile
        other = next_other
    return totals, products, squares


@triton.jit
def _sum_staged(totals, products, squares, weights, ups, inside, x_ptr, norm_ptr, K, columns, TOKENS: tl.constexpr,
                BLOCK_K: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
                EVEN: tl.constexpr):  # fmt: skip
    """The sums of rows whose tiles pass through shared memory."""
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        here = start + columns < K
        tile = _tile(weights + start, inside, here, EVEN)
        other = _tile(ups + start, inside, here, EVEN) if GATED else tile
        totals, products, squares = _add(
            totals, products, squares, tile, other, _inputs(x_ptr, norm_ptr, K, start + columns, TOKENS, NORM),
            TOKENS, NORM, GATED,
        )  # fmt: skip
    return totals, products, squares


@triton.jit
def _activated(gate, GELU: tl.constexpr):
    """SiLU, or the tanh form of GELU: x * sigmoid(z), where z is x itself or the cubic of that form."""
    z = gate
    if GELU:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    return gate / (1.0 + tl.exp(-z))


@triton.jit(do_not_specialize=["eps"])
def skinny_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K], or [2N, K] when GATED: gate rows, then up rows
    out_ptr,  # [T, N]
    norm_ptr,  # [K]
    bias_ptr,  # [N]
    residual_ptr,  # [T, N]
    normed_ptr,  # [T, K]
    N,
    K,
    eps,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N rows of the product for TOKENS tokens; `decode.py` has the formula, its `Tile` the shapes.

    STAGES   1: the next tile waits in registers; more: so many tiles pass through shared memory
    WHOLE    tiles of a row, all of which wait in registers; 0: the next one does
    EARLY    the next tile is asked for before this one's sums
    KEEP     normed tokens are written to normed_ptr
    EVEN_N, EVEN_K   rows and columns are whole tiles
    """
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    inside = rows < N
    weights = weight_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    ups = weights + N.to(tl.int64) * K
    w = ()
    u = ()
    if STAGES == 1:  # the first tile waits in registers, or all WHOLE of a row
        for ahead in tl.static_range(WHOLE if WHOLE > 0 else 1):
            here = ahead * BLOCK_K + columns < K
            w = w + (_tile(weights + ahead * BLOCK_K, inside, here, EVEN_N and EVEN_K),)
            u = u + (_tile(ups + ahead * BLOCK_K, inside, here, EVEN_N and EVEN_K) if GATED else 0.0,)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    totals = ()
    products = ()
    squares = ()
    for _ in tl.static_range(TOKENS):
        totals = totals + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        products = products + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32) if GATED else 0.0,)
        squares = squares + (tl.zeros([BLOCK_K], tl.float32) if NORM else 0.0,)
    if WHOLE > 0:
        sums = _sum_whole(totals, products, squares, w, u, x_ptr, norm_ptr, K, columns, TOKENS, BLOCK_K, NORM, GATED)
    elif STAGES == 1:
        sums = _sum_ahead(
            totals, products, squares, w[0], u[0], weights, ups, inside, x_ptr, norm_ptr, K, columns,
            TOKENS, BLOCK_K, EARLY, NORM, GATED,
        )  # fmt: skip
    else:
        sums = _sum_staged(
            totals, products, squares, weights, ups, inside, x_ptr, norm_ptr, K, columns,
            TOKENS, BLOCK_K, STAGES, NORM, GATED, EVEN_N and EVEN_K,
        )  # fmt: skip
    totals, products, squares = sums
    for token in tl.static_range(TOKENS):
        y = tl.sum(totals[token], 1)
        scale = tl.rsqrt(tl.sum(squares[token], 0) / K + eps) if NORM else 1.0
        y *= scale
        if BIAS:
            y += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            y = _activated(y, GELU) * (tl.sum(products[token], 1) * scale)
        if RESIDUAL:
            y += tl.load(residual_ptr + token * N + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * N + rows, y.to(out_ptr.dtype.element_ty), mask=inside)
        if KEEP and tl.program_id(0) == 0:
            _keep(x_ptr + token * K, normed_ptr + token * K, norm_ptr, scale, K, BLOCK_K, NORM)


@triton.jit
def _keep(x_ptr, normed_ptr, norm_ptr, scale, K, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    """Write a normed token down, for kernels that would have to norm it again."""
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        if NORM:
            x *= scale * tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        tl.store(normed_ptr + columns, x.to(normed_ptr.dtype.element_ty), mask=columns < K)


@triton.jit
def gate_kernel(both_ptr, out_ptr, size, BLOCK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both_ptr + row * 2 * size + column, mask=column < size, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + (row * 2 + 1) * size + column, mask=column < size, other=0.0).to(tl.float32)
    out = _activated(gate, GELU) * up
    tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), mask=column < size)
