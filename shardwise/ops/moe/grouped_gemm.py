"""Grouped GEMM over routed token rows with bf16, fp16, float32 or e4m3 weights.

Few tokens an expert: out^T [N, tokens] = W x^T, so that a tile's long side is the weights' (64 rows of them for as few
as 16 tokens). Many: out [tokens, N] = x W^T, and the tokens may have been copied into the experts' order first.
Weights, and activations that lie in order, come by the tensor memory accelerator where their rows are multiples of 16
bytes; others are gathered.
"""

from shardwise.ops.ptx import finish_products
from shardwise.ops.quantization.triton_fp8 import quantized
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _step(acc, w, x, TOKENS_LEFT: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + W x^T, or acc + x W^T; W [BN, BK], x [BT, BK]."""
    if not INTERPRET and w.dtype != x.dtype:
        w = w.to(tl.float32).to(x.dtype)  # the hardware converts pairs to and from float32, single ones else
    if TOKENS_LEFT:
        left, right = x, tl.trans(w)
    else:
        left, right = w, tl.trans(x)
    if INTERPRET:
        return acc + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    if left.dtype == tl.float32:
        return tl.dot(left, right, acc, input_precision="tf32x3")
    return tl.dot(left, right, acc)


@triton.jit
def _weights(w, row, n, real, k, columns, BK: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr):
    """[BN, BK] at `row` + n of the stack of all experts' rows; rows beyond an expert's last are never kept."""
    if TMA:
        return w.load([row, k])
    else:
        column = k + tl.arange(0, BK)
        at = w + row.to(tl.int64) * columns + tl.where(real, n, 0)[:, None] * columns + column[None, :]
        return tl.load(at) if EVEN_K else tl.load(at, mask=(column < columns)[None, :], other=0.0)


@triton.jit
def _tokens(x, start, rows, valid, k, columns, stride, BK: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr):
    """[BT, BK] of the block's rows."""
    if TMA:
        return x.load([start, k])
    else:
        column = k + tl.arange(0, BK)
        at = x + rows[:, None] * stride + column[None, :]
        mask = valid[:, None] if EVEN_K else valid[:, None] & (column < columns)[None, :]
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _place(index, blocks, per_block, GROUP: tl.constexpr):
    """(block, position in it) of a tile: GROUP blocks share the weights they read while these are in the L2 cache."""
    group = index // (GROUP * per_block)
    within = index - group * (GROUP * per_block)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _lines(values, TOKENS_LEFT: tl.constexpr):
    """A vector over n as a line of the accumulator."""
    return values[None, :] if TOKENS_LEFT else values[:, None]


@triton.jit(do_not_specialize=["pairs", "sharing"])
def gather_rows(
    x_ptr, out_ptr, sorted_ptr, block_ptr, pairs, sharing, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[position] = x[pair // sharing] for the sorted positions of local pairs, ROWS of them a program."""
    await_predecessor(PDL)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(sorted_ptr + position, mask=position < pairs, other=0) // sharing
    real = position < tl.load(block_ptr + 3 * tl.load(block_ptr))  # the end of the last block; 0 without any
    inside = real[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside)
    tl.store(out_ptr + position[:, None].to(tl.int64) * columns + column[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["pairs", "sharing"])
def grouped_gemm(
    x, w, out_ptr, sorted_ptr, block_ptr, scale_ptr, factor_ptr, quant_ptr, routing_ptr, pairs, sharing, columns,
    out_rows, stride_x,
    GATHER: tl.constexpr, BY_PAIR: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr, FACTORED: tl.constexpr,
    QUANTIZE: tl.constexpr, WEIGHT_IN: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, TOKENS_LEFT: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (token block, n tile, k split); n tiles of BN output rows.

    w           [E, N, K], twice N rows (up, then gate) with ACT "silu"; with TMA a descriptor of [E * N, K]
    x           [rows, K]; with TMA and without GATHER a descriptor
    GATHER      `sharing` pairs share a row of x, which is gathered; otherwise x stands in sorted positions
    BY_PAIR     results go to their pairs, [SPLITS, pairs, N]; otherwise to sorted positions
    ACT         "none", "silu" (silu(gate) * up) or "relu2"
    SCALED      "expert": products are multiplied with scale_ptr[expert]; "block": with the scales of 128 x 128
                weights each, [E, ceil(N/128), ceil(K/128)], twice as many rows with ACT "silu"; "channel": with those
                of the weights' rows, [E, N], or [E, 2N]; FACTORED: also with factor_ptr[0]
    QUANTIZE    results are divided ("divide") by quant_ptr[0] or multiplied ("multiply") with it and stored as e4m3
    WEIGHT_IN   products are multiplied with routing_ptr[pair], which is the routing weight applied to the input
    """
    await_predecessor(PDL)
    GATED: tl.constexpr = ACT == "silu"
    ROWS: tl.constexpr = BT if TOKENS_LEFT else BN
    COLUMNS: tl.constexpr = BN if TOKENS_LEFT else BT
    n_tiles = tl.cdiv(out_rows, BN)
    blocks = tl.load(block_ptr)
    per_block = n_tiles * SPLITS
    k_steps = tl.cdiv(tl.cdiv(columns, BK), SPLITS)
    for index in tl.range(tl.program_id(0), blocks * per_block, tl.num_programs(0), num_stages=1):
        block, place = _place(index, blocks, per_block, GROUP)
        split, n_start = place % SPLITS, place // SPLITS * BN
        expert = tl.load(block_ptr + 1 + 3 * block)
        start = tl.load(block_ptr + 2 + 3 * block)
        stop = tl.load(block_ptr + 3 + 3 * block)
        position = start + tl.arange(0, BT)
        valid = position < stop
        pair = tl.load(sorted_ptr + position, mask=valid, other=0)
        rows = pair // sharing if GATHER else position
        n = n_start + tl.arange(0, BN)
        real = n < out_rows
        first = expert * (out_rows * (2 if GATED else 1))
        scale_rows = tl.cdiv(out_rows, 128) * (2 if GATED else 1)
        at_row = first + n_start if TMA else first
        # What the results are scaled with is asked for before the rows: behind them it would be a wait of its own.
        factor = tl.load(scale_ptr + expert) if SCALED == "expert" else 1.0
        if FACTORED:
            factor *= tl.load(factor_ptr)
        quant = tl.load(quant_ptr) if QUANTIZE != "" else 1.0
        if WEIGHT_IN:
            weight = tl.load(routing_ptr + pair, mask=valid, other=0.0).to(tl.float32)
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in tl.range(split * k_steps, (split + 1) * k_steps, num_stages=STAGES):
            k = step * BK
            tokens = _tokens(x, start, rows, valid, k, columns, stride_x, BK, TMA and not GATHER, EVEN_K)
            up = _weights(w, at_row, n, real, k, columns, BK, TMA, EVEN_K)
            if SCALED == "block":
                scale_at = scale_ptr + (expert * scale_rows + n_start // 128) * tl.cdiv(columns, 128) + k // 128
                zero = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
                acc += _step(zero, up, tokens, TOKENS_LEFT, INTERPRET) * tl.load(scale_at)
            else:
                acc = _step(acc, up, tokens, TOKENS_LEFT, INTERPRET)
            if GATED:
                other = _weights(w, at_row + out_rows, n, real, k, columns, BK, TMA, EVEN_K)
                if SCALED == "block":
                    scale_at += tl.cdiv(out_rows, 128) * tl.cdiv(columns, 128)
                    gate += _step(zero, other, tokens, TOKENS_LEFT, INTERPRET) * tl.load(scale_at)
                else:
                    gate = _step(gate, other, tokens, TOKENS_LEFT, INTERPRET)
            if SCALED == "channel" and not INTERPRET:  # a left operand that was made in registers
                finish_products()
        if SCALED == "channel":
            own = scale_ptr + first + n
            acc *= _lines(tl.load(own, mask=real, other=0.0), TOKENS_LEFT)
            if GATED:
                gate *= _lines(tl.load(own + out_rows, mask=real, other=0.0), TOKENS_LEFT)
        elif SCALED != "":
            acc *= factor
            gate *= factor
        if WEIGHT_IN:
            acc *= _lines(weight, not TOKENS_LEFT)
            gate *= _lines(weight, not TOKENS_LEFT)
        if ACT == "silu":
            acc *= gate / (1.0 + tl.exp(-gate))
        if ACT == "relu2":
            acc = tl.maximum(acc, 0.0) * tl.maximum(acc, 0.0)
        value = quantized(acc, quant, QUANTIZE, INTERPRET).to(out_ptr.dtype.element_ty)
        at = (split * pairs + pair if BY_PAIR else position).to(tl.int64) * out_rows
        out = out_ptr + _lines(at, not TOKENS_LEFT) + _lines(n, TOKENS_LEFT)
        tl.store(out, value, mask=_lines(real, TOKENS_LEFT) & _lines(valid, not TOKENS_LEFT))
