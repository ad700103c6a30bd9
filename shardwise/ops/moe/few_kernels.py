"""Two kernels for a token or a few: every pair's expert as matrix-vector products, a token's experts summed at once.

Each pair reads its expert's rows, whoever else chose it, so nothing has to be grouped and nothing is left to combine.
Rows stream through registers with 16 bytes a thread and load; sums are float32.
"""

from shardwise.ops.quantization.triton_fp8 import encode_e4m3, quantized
from shardwise.ops.tensor_memory import prefetch
from shardwise.ops.triton_support import await_and_trigger, tl, triton


@triton.jit
def _scale(scale_ptr, factor_ptr, expert, held, FACTORED: tl.constexpr):
    scale = tl.load(scale_ptr + expert, mask=held, other=0.0)
    if FACTORED:
        scale *= tl.load(factor_ptr)
    return scale


@triton.jit
def _tile_scales(line, k, columns, BK: tl.constexpr, VECTOR: tl.constexpr):
    """[BK / VECTOR], of the tiles of 128 columns that the parts of a sum belong to."""
    column = k + tl.arange(0, BK // VECTOR) * VECTOR
    return tl.load(line + column // 128, mask=column < columns, other=0.0)


@triton.jit(do_not_specialize=["experts"])
def few_up(
    x_ptr, w_ptr, out_ptr, id_ptr, routing_ptr, scale_ptr, factor_ptr, in_ptr, quant_ptr, experts, columns, out_rows,
    TOP_K: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr, FACTORED: tl.constexpr, QUANTIZE: tl.constexpr,
    WEIGHT_IN: tl.constexpr, GRAIN: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr, EVEN_K: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one pair's activation. Arguments as in `grouped_gemm`; in_ptr is the scale that x is divided by.

    GRAIN   "tile", "channel": e4m3 weights meet x as it is; scale_ptr has their scales, as `WeightScales`. ROWS
            divides 128
    """
    await_and_trigger(PDL)
    GATED: tl.constexpr = ACT == "silu"
    pair = tl.program_id(0)
    expert = tl.load(id_ptr + pair).to(tl.int32)
    if (expert < 0) | (expert >= experts):
        return
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = n < out_rows
    column = tl.arange(0, BK)
    first = expert.to(tl.int64) * (out_rows * (2 if GATED else 1)) * columns
    w_at = w_ptr + first + tl.where(real, n, 0)[:, None] * columns + column[None, :]
    x_ptr += (pair // TOP_K).to(tl.int64) * columns
    weight = tl.load(routing_ptr + pair).to(tl.float32) if WEIGHT_IN else 1.0
    # Scales are asked for before the rows: behind them, each would be a wait of its own.
    inverse = 1.0 / tl.load(in_ptr) if SCALED else 1.0
    scale = _scale(scale_ptr, factor_ptr, expert, True, FACTORED) if SCALED else 1.0
    quant = tl.load(quant_ptr) if SCALED else 1.0
    if GRAIN == "tile":
        tile_rows, tile_columns = tl.cdiv(out_rows, 128), tl.cdiv(columns, 128)
        line = expert * (tile_rows * (2 if GATED else 1)) + tl.program_id(1) * ROWS // 128
        up_line = scale_ptr + line * tile_columns
        gate_line = up_line + tile_rows * tile_columns
    acc = tl.zeros((ROWS, BK // VECTOR), dtype=tl.float32)
    gate = tl.zeros((ROWS, BK // VECTOR), dtype=tl.float32)
    for k in tl.range(0, columns, BK, num_stages=STAGES):
        within = column < columns - k
        x = tl.load(x_ptr + k + column) if EVEN_K else tl.load(x_ptr + k + column, mask=within, other=0.0)
        up = tl.load(w_at + k) if EVEN_K else tl.load(w_at + k, mask=within[None, :], other=0.0)
        x = x.to(tl.float32)
        if WEIGHT_IN:
            x *= weight
            if SCALED:  # the contract rounds a weighted input to its own type before it quantises it
                x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        if SCALED:
            x = encode_e4m3(x * inverse, INTERPRET).to(tl.float32)
        part = tl.sum(tl.reshape(up.to(tl.float32) * x[None, :], (ROWS, BK // VECTOR, VECTOR)), axis=2)
        if GRAIN == "tile":
            part *= _tile_scales(up_line, k, columns, BK, VECTOR)[None, :]
        acc += part
        if GATED:
            other = w_at + out_rows * columns + k
            other = tl.load(other) if EVEN_K else tl.load(other, mask=within[None, :], other=0.0)
            part = tl.sum(tl.reshape(other.to(tl.float32) * x[None, :], (ROWS, BK // VECTOR, VECTOR)), axis=2)
            if GRAIN == "tile":
                part *= _tile_scales(gate_line, k, columns, BK, VECTOR)[None, :]
            gate += part
    value = tl.sum(acc, axis=1)
    other = tl.sum(gate, axis=1)
    if SCALED:
        value *= scale
        other *= scale
    if GRAIN == "channel":
        own = scale_ptr + expert * (out_rows * (2 if GATED else 1)) + n
        value *= tl.load(own, mask=real, other=0.0)
        if GATED:
            other *= tl.load(own + out_rows, mask=real, other=0.0)
    if GATED:
        value *= other / (1.0 + tl.exp(-other))
    else:
        value = tl.maximum(value, 0.0) * tl.maximum(value, 0.0)
    result = quantized(value, quant, QUANTIZE, INTERPRET).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pair.to(tl.int64) * out_rows + n, result, mask=real)


@triton.jit(do_not_specialize=["experts"])
def few_down(
    inner_ptr, w_ptr, out_ptr, id_ptr, routing_ptr, scale_ptr, factor_ptr, experts, columns, out_rows,
    TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, SCALED: tl.constexpr, FACTORED: tl.constexpr, WEIGHTED: tl.constexpr,
    GRAIN: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    EVEN_K: tl.constexpr, AHEAD: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS elements of one token's sum over its local experts. GRAIN as in `few_up`.

    Launched behind `few_up`: ids, weights and scales were complete before that began. AHEAD lines of 128 bytes of every
    row are asked for while it runs.
    """
    token = tl.program_id(1)
    choice = tl.arange(0, K_BLOCK)
    pair = token * TOP_K + choice
    expert = tl.load(id_ptr + pair, mask=choice < TOP_K, other=-1).to(tl.int32)
    held = (expert >= 0) & (expert < experts)
    expert = tl.where(held, expert, 0)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = n < out_rows
    if SCALED:
        scale = _scale(scale_ptr, factor_ptr, expert, held, FACTORED)
    if GRAIN == "channel":
        own = tl.load(
            scale_ptr + expert[:, None] * out_rows + n[None, :], mask=held[:, None] & real[None, :], other=0.0
        )
    if GRAIN == "tile":
        place = tl.arange(0, BK // VECTOR) * VECTOR
        lines = expert * tl.cdiv(out_rows, 128) + tl.program_id(0) * ROWS // 128
        scale_at = scale_ptr + lines[:, None] * tl.cdiv(columns, 128)
    if WEIGHTED:
        routing = tl.load(routing_ptr + pair, mask=held, other=0.0).to(tl.float32)
    row_at = w_ptr + (expert[:, None].to(tl.int64) * out_rows + tl.where(real, n, 0)[None, :]) * columns
    if AHEAD > 0:
        line = tl.arange(0, AHEAD) * (8 * VECTOR)
        lines = row_at[:, :, None] + tl.where(line < columns, line, 0)[None, None, :]
        prefetch(lines, INTERPRET)
    await_and_trigger(PDL)
    column = tl.arange(0, BK)
    acc = tl.zeros((K_BLOCK, ROWS, BK // VECTOR), dtype=tl.float32)
    for k in tl.range(0, columns, BK, num_stages=STAGES):
        within = held[:, None] if EVEN_K else held[:, None] & (column < columns - k)[None, :]
        w = tl.load(row_at[:, :, None] + k + column[None, None, :], mask=within[:, None, :], other=0.0).to(tl.float32)
        inner = tl.load(inner_ptr + pair[:, None] * columns + k + column[None, :], mask=within, other=0.0)
        products = w * inner.to(tl.float32)[:, None, :]
        part = tl.sum(tl.reshape(products, (K_BLOCK, ROWS, BK // VECTOR, VECTOR)), axis=3)
        if GRAIN == "tile":
            here = held[:, None] & (k + place < columns)[None, :]
            part *= tl.load(scale_at + (k + place)[None, :] // 128, mask=here, other=0.0)[:, None, :]
        acc += part
    value = tl.sum(acc, axis=2)
    if GRAIN == "channel":
        value *= own
    if SCALED:
        value *= scale[:, None]
    if WEIGHTED:
        value *= routing[:, None]
    total = tl.sum(value, axis=0)
    tl.store(out_ptr + token.to(tl.int64) * out_rows + n, total.to(out_ptr.dtype.element_ty), mask=real)
