"""Triton kernels for FP8: static quantisation, and a linear for few rows that is bound by reading its weights."""

import torch
from torch import Tensor

from shardwise.ops.triton_support import (
    Launcher,
    aligned,
    await_predecessor,
    dependent_launch,
    interpreting,
    tl,
    triton,
)


@triton.jit
def encode_e4m3(value, INTERPRET: tl.constexpr):
    """e4m3 of clamp(value, -448, 448), value float32; the interpreter's own cast rounds some values down a binade."""
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    if INTERPRET:
        exponent = (value.to(tl.int32, bitcast=True) >> 23) & 0xFF
        quantum = (tl.maximum(exponent, 121) - 3) << 23
        quantum = quantum.to(tl.float32, bitcast=True)
        value = ((value / quantum + 12582912.0) - 12582912.0) * quantum  # 1.5 * 2**23: ties to even
    return value.to(tl.float8e4nv)


@triton.jit
def quantize_kernel(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr):
    """e4m3 of clamp(x / scale, -448, 448), elementwise."""
    await_predecessor(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, encode_e4m3(x / tl.load(scale_ptr), INTERPRET), mask=at < size)


@triton.jit
def few_rows_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, in_scale_ptr, w_scale_ptr, rows, columns, outputs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """[BM, BN] outputs: weights [BN, BK] stream through, the rows are quantised on the way."""
    await_predecessor(PDL)
    m = tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.arange(0, BK)
    in_scale = tl.load(in_scale_ptr)
    w_at = tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * columns + column[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in tl.range(0, columns, BK, num_stages=STAGES):
        inside = (k + column < columns)[None, :]
        w = tl.load(w_ptr + w_at + k, mask=inside, other=0.0)
        x = tl.load(x_ptr + m[:, None] * columns + k + column[None, :], mask=(m < rows)[:, None] & inside, other=0.0)
        codes = encode_e4m3(x.to(tl.float32) / in_scale, INTERPRET)
        if INTERPRET:
            acc += tl.dot(w.to(tl.float32), tl.trans(codes).to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(w, tl.trans(codes), acc)
    acc *= in_scale * tl.load(w_scale_ptr)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + m[None, :] * outputs + n[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(n < outputs)[:, None] & (m < rows)[None, :])


_quantize, _few_rows = Launcher(quantize_kernel), Launcher(few_rows_kernel)


def quantize(values: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn of clamp(values / scale, -448, 448) in one launch; `scale` one float32 element."""
    out = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    size, block = values.numel(), 2048
    pdl = dependent_launch(values.device)
    _quantize(
        values.device,
        (values.dtype, aligned(values, scale), size % 16 == 0, size == 1, pdl),
        (-(-size // block), 1, 1),
        (values, scale, out, size, block, interpreting(), pdl),
        num_warps=8,
        launch_pdl=pdl,
    )
    return out


def few_rows_linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, in_scale: Tensor, weight_scale: Tensor
) -> Tensor:
    """rows [M, K] (quantised here) x weight e4m3 [N, K]^T with scales and bias, in rows' dtype."""
    (count, columns), outputs = rows.shape, weight.shape[0]
    out = torch.empty((count, outputs), dtype=rows.dtype, device=rows.device)
    device, pdl = rows.device, dependent_launch(rows.device)
    bm, bn, bk, stages = max(16, 1 << (count - 1).bit_length()), 32, 256, 5
    constants = (bm, bn, bk, stages, bias is not None, interpreting(), pdl)
    bias = weight_scale if bias is None else bias
    key = (rows.dtype, bias.dtype, aligned(rows, weight, bias, in_scale, weight_scale), columns, outputs, count == 1)
    _few_rows(
        device,
        (*key, count % 16 == 0, constants),
        (-(-outputs // bn), 1, 1),
        (rows, weight, bias, out, in_scale, weight_scale, count, columns, outputs) + constants,
        num_warps=4,
        num_stages=stages,
        launch_pdl=pdl,
    )
    return out
