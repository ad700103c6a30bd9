"""Triton kernels for FP8: static quantisation, and a linear for few rows that is bound by reading its weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.tensor_memory import matrix_tiles, prefetch
from shardwise.ops.triton_support import await_predecessor, dependent_launch, interpreting, tl, triton

MOST_FEW_ROWS = 64
"""Rows up to which the kernel below beats quantising and the library's product, or is within 2 us of it (H100)."""
AHEAD_LINES = 8


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
def quantized(value, scale, HOW: tl.constexpr, INTERPRET: tl.constexpr):
    """e4m3 of float32 values that are divided by the scale (HOW "divide") or multiplied with it ("multiply"), or the
    values as they are ("").
    """
    if HOW == "divide":
        result = encode_e4m3(value / scale, INTERPRET)
    elif HOW == "multiply":
        result = encode_e4m3(value * scale, INTERPRET)
    else:
        result = value
    return result


@triton.jit
def quantize_kernel(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr):
    """e4m3 of clamp(x / scale, -448, 448), elementwise."""
    await_predecessor(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, encode_e4m3(x / tl.load(scale_ptr), INTERPRET), mask=at < size)


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x, w, w_ptr, bias_ptr, out_ptr, in_scale_ptr, w_scale_ptr, rows, columns, outputs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    AHEAD: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """[BM, BN] outputs of e4m3 rows [M, K], all of them, and weights [N, K], which stream through shared memory.

    x, w    descriptors with TMA, else pointers; w_ptr is the pointer always
    AHEAD   lines of 128 bytes of each weight row that are asked for before the rows are there
    """
    first = tl.program_id(0) * BN
    n = first + tl.arange(0, BN)
    row_at = tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * columns
    if AHEAD > 0:
        line = tl.arange(0, AHEAD) * 128
        prefetch(w_ptr + row_at + tl.where(line < columns, line, 0)[None, :], INTERPRET)
    await_predecessor(PDL)
    m = tl.arange(0, BM)
    column = tl.arange(0, BK)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in tl.range(0, columns, BK, num_stages=STAGES):
        if TMA:
            left, right = w.load([first, k]), x.load([0, k])
        else:
            inside = (k + column < columns)[None, :]
            left = tl.load(w + row_at + k + column[None, :], mask=inside, other=0.0)
            right = tl.load(
                x + m[:, None] * columns + k + column[None, :], mask=(m < rows)[:, None] & inside, other=0.0
            )
        if INTERPRET:
            acc += tl.dot(left.to(tl.float32), tl.trans(right).to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(left, tl.trans(right), acc)
    acc *= tl.load(in_scale_ptr) * tl.load(w_scale_ptr)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + m[None, :] * outputs + n[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(n < outputs)[:, None] & (m < rows)[None, :])


_quantize, _few_rows = Launcher(quantize_kernel), Launcher(few_rows_kernel)


def quantize(values: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn of clamp(values / scale, -448, 448) in one launch; `scale` one float32 element.

    Some 100 programs at least: with 7 for one row of 14336, the product behind it took 3 us more on an H100.
    """
    out = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    size, pdl = values.numel(), dependent_launch(values.device)
    block = min(2048, max(128, triton.next_power_of_2(size // 128)))
    _quantize(
        values.device,
        (values.dtype, aligned(values, scale), size % 16 == 0, size == 1, block, pdl),
        (-(-size // block), 1, 1),
        (values, scale, out, size, block, interpreting(), pdl),
        num_warps=4 if block <= 512 else 8,
        launch_pdl=pdl,
    )
    return out


@dataclass(frozen=True)
class FewRows:
    """Shape of one launch of `few_rows_kernel`."""

    outputs: int  # of a program
    step: int  # columns of a step
    stages: int
    warps: int


def choose_few_rows(rows: int) -> FewRows:
    """Tall tiles, however few programs that leaves, and as many stages as fit.

    Measured on an H100 with weights of 2048 x 2048 to 28672 x 4096: 64 outputs by 256 columns won everywhere, even
    where 32 programs had all of 2048 outputs (4.1 us; with 16 or 32 outputs a program 5 us and more).
    """
    return FewRows(64, 256, 8 if rows <= 32 else 6, 4)


def few_rows_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_scale: Tensor,
    weight_scale: Tensor,
) -> Tensor:
    """rows [M, K], M at most 64 (quantised first), x weight e4m3 [N, K]^T with scales and bias, in rows' dtype."""
    (count, columns), outputs = rows.shape, weight.shape[0]
    out = torch.empty((count, outputs), dtype=rows.dtype, device=rows.device)
    device, pdl = rows.device, dependent_launch(rows.device)
    shape = choose_few_rows(count)
    codes = quantize(rows, in_scale)
    block = max(16, 1 << (count - 1).bit_length())
    tma = columns % 16 == 0 and weight.data_ptr() % 16 == 0
    x, w = (codes, weight)
    if tma:
        x, w = matrix_tiles(codes, block, shape.step), matrix_tiles(weight, shape.outputs, shape.step)
    constants = (
        (block, shape.outputs, shape.step, shape.stages, bias is not None, tma, 0 if interpreting() else AHEAD_LINES)
        + (interpreting(), pdl)
    )  # fmt: skip
    bias = weight_scale if bias is None else bias
    key = (rows.dtype, bias.dtype, aligned(weight, bias, in_scale, weight_scale), columns, outputs)
    _few_rows(
        device,
        (*key, shape.warps, constants),
        (-(-outputs // shape.outputs), 1, 1),
        (x, w, weight, bias, out, in_scale, weight_scale, count, columns, outputs) + constants,
        num_warps=shape.warps,
        launch_pdl=pdl,
    )
    return out
