"""Grouped GEMM over routed token rows with bf16, fp16 or e4m3 weights, transposed: out^T [N, tokens] = W x^T.

Weights on the left make the tile's long side theirs: 64 rows of weights for as few as 16 tokens.
"""

from shardwise.ops.quantization.triton_fp8 import encode_e4m3
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _step(acc, w, x, INTERPRET: tl.constexpr):
    if INTERPRET:
        return acc + tl.dot(w.to(tl.float32), tl.trans(x).to(tl.float32), input_precision="ieee")
    if w.dtype == tl.float32:
        return tl.dot(w, tl.trans(x), acc, input_precision="tf32x3")
    return tl.dot(w, tl.trans(x), acc)


@triton.jit(do_not_specialize=["pairs"])
def grouped_gemm(
    x_ptr, w_ptr, out_ptr, sorted_ptr, block_ptr, scale_ptr, quant_ptr, routing_ptr, pairs, columns, out_rows, stride_x,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr, QUANTIZE: tl.constexpr,
    WEIGHT_IN: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (token block, n tile, k split); n tiles of BN output rows.

    w_ptr       [E, N, K], twice N rows (up, then gate) with ACT "silu"
    GATHER      x rows are tokens, pair // TOP_K, and results go to sorted positions; otherwise the reverse
    ACT         "none", "silu" (silu(gate) * up) or "relu2"
    SCALED      products are multiplied with scale_ptr[expert]
    QUANTIZE    results are divided by quant_ptr[0] and stored as e4m3
    WEIGHT_IN   products are multiplied with routing_ptr[pair], which is the routing weight applied to the input
    """
    await_predecessor(PDL)
    GATED: tl.constexpr = ACT == "silu"
    n_tiles = tl.cdiv(out_rows, BN)
    total = tl.load(block_ptr) * n_tiles * SPLITS
    k_steps = tl.cdiv(tl.cdiv(columns, BK), SPLITS)
    column = tl.arange(0, BK)
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        split = index % SPLITS
        n_tile = index // SPLITS % n_tiles
        block = index // SPLITS // n_tiles
        expert = tl.load(block_ptr + 1 + 3 * block)
        start = tl.load(block_ptr + 2 + 3 * block)
        stop = tl.load(block_ptr + 3 + 3 * block)
        position = start + tl.arange(0, BT)
        valid = position < stop
        pair = tl.load(sorted_ptr + position, mask=valid, other=0)
        rows = pair // TOP_K if GATHER else position
        n = n_tile * BN + tl.arange(0, BN)
        real = n < out_rows
        weights = w_ptr + expert.to(tl.int64) * (out_rows * (2 if GATED else 1)) * columns
        w_at = tl.where(real, n, 0)[:, None] * columns + column[None, :]
        x_at = rows[:, None] * stride_x + column[None, :]
        acc = tl.zeros((BN, BT), dtype=tl.float32)
        gate = tl.zeros((BN, BT), dtype=tl.float32)
        for step in tl.range(split * k_steps, (split + 1) * k_steps, num_stages=STAGES):
            k = step * BK
            if EVEN_K:
                x = tl.load(x_ptr + x_at + k, mask=valid[:, None], other=0.0)
                w = tl.load(weights + w_at + k)
            else:
                within = (column + k < columns)[None, :]
                x = tl.load(x_ptr + x_at + k, mask=valid[:, None] & within, other=0.0)
                w = tl.load(weights + w_at + k, mask=within, other=0.0)
            acc = _step(acc, w, x, INTERPRET)
            if GATED:
                if EVEN_K:
                    v = tl.load(weights + out_rows * columns + w_at + k)
                else:
                    v = tl.load(weights + out_rows * columns + w_at + k, mask=within, other=0.0)
                gate = _step(gate, v, x, INTERPRET)
        if SCALED:
            factor = tl.load(scale_ptr + expert)
            acc *= factor
            gate *= factor
        if WEIGHT_IN:
            weight = tl.load(routing_ptr + pair, mask=valid, other=0.0).to(tl.float32)[None, :]
            acc *= weight
            gate *= weight
        if ACT == "silu":
            acc *= gate / (1.0 + tl.exp(-gate))
        if ACT == "relu2":
            acc = tl.maximum(acc, 0.0) * tl.maximum(acc, 0.0)
        at = position if GATHER else split * pairs + pair
        out = out_ptr + at.to(tl.int64)[None, :] * out_rows + n[:, None]
        if QUANTIZE:
            value = encode_e4m3(acc / tl.load(quant_ptr), INTERPRET)
        else:
            value = acc.to(out_ptr.dtype.element_ty)
        tl.store(out, value, mask=real[:, None] & valid[None, :])
