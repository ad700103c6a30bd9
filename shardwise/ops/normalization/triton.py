"""RMS norms as Triton kernels: one pass over memory, statistics and weight in float32, one rounding at the end."""

import functools
from typing import NamedTuple

import torch

from shardwise.ops.devices import one_device
from shardwise.ops.kernel_launch import Form, Kernel
from shardwise.ops.normalization.reference import (
    add_norm_fake,
    check_add_norm,
    check_gated,
    check_weight,
    row_stride,
)
from shardwise.ops.ptx import silu
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import await_predecessor, dependent_launch, multiprocessors, tl, triton


@triton.jit(do_not_specialize=["eps", "groups"])
def _norm_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    eps,
    groups,
    x_stride,
    gate_stride,
    PER_ROW: tl.constexpr,  # groups in a row
    SIZE: tl.constexpr,  # elements in a group
    PIECES: tl.constexpr,  # tiles that hold a group
    BLOCK: tl.constexpr,  # columns of a tile
    ROWS: tl.constexpr,  # groups in a program
    GATED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = tl.arange(0, BLOCK)[None, :]
    x_row, gate_row = x_ptr + (group // PER_ROW) * x_stride, gate_ptr + (group // PER_ROW) * gate_stride
    start = (group % PER_ROW) * SIZE
    await_predecessor(PDL)
    values, factors = (), ()
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for piece in tl.static_range(PIECES):
        within = start + piece * BLOCK + first
        mask = (group < groups) & (piece * BLOCK + first < SIZE)
        x = tl.load(x_row + within, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight_ptr + within, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(gate_row + within, mask=mask, other=0.0).to(tl.float32)
            if NORM_FIRST:
                factor *= silu(gate)
            else:
                x *= silu(gate)
        squares += x * x
        values, factors = values + (x,), factors + (factor,)  # type: ignore[assignment]  # they grow
    scale = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / SIZE + eps)
    for piece in tl.static_range(PIECES):
        mask = (group < groups) & (piece * BLOCK + first < SIZE)
        out = (values[piece] * scale * factors[piece]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + group * SIZE + piece * BLOCK + first, out, mask=mask)


@triton.jit(do_not_specialize=["eps"])
def _add_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    eps,
    x_stride,
    residual_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    x_row, residual_row = x_ptr + row * x_stride + column, residual_ptr + row * residual_stride + column
    await_predecessor(PDL)
    x = tl.load(x_row, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_row, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    total = (x + residual).to(x_ptr.dtype.element_ty)
    tl.store(residual_row, total, mask=mask)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / SIZE + eps)
    tl.store(x_row, (total * scale * weight).to(x_ptr.dtype.element_ty), mask=mask)


_norm, _add_norm = Kernel(_norm_kernel), Kernel(_add_norm_kernel)


def _warps(programs: int, elements: int, gated: bool, device: torch.device) -> int:
    """Warps of a program that holds `elements` numbers of each tensor, by sweeps on an H100.

    A warp for 1024 numbers moves much data best. A small launch is a chain of latencies, which more warps shorten as
    long as all programs run at once: 512 rows of 2880 numbers take 2.3 µs instead of 2.5, with fused add 3.0 not 3.8.
    With a gate there is as much to compute as to move, and 512 numbers a warp are best or level at any number of rows:
    512 rows of 2880 take 2.8 µs instead of 3.3, 8192 rows 48.4 instead of 49.5.
    """
    if gated:
        return min(16, max(4, 1 << max(0, (elements // 512).bit_length() - 1)))
    streaming, processors = min(16, 1 << max(1, (elements // 1024).bit_length() - 1)), multiprocessors(device)
    if elements < 1024 or programs > 4 * processors:
        return streaming
    return 16 if elements == 4096 and programs > processors else max(8, streaming)


def _tiles(size: int, gated: bool) -> tuple[int, int]:
    """(tiles, columns of each) for a group: one, or three where that leaves a quarter of the lanes less idle.

    With a gate the lanes are as busy as the memory: on an H200, 360 numbers in a tile of 512 took 1.7 times a copy's
    time, 512 took 1.1 times.
    """
    block = 1 << (size - 1).bit_length()
    return (3, block // 4) if gated and block >= 128 and size <= block // 4 * 3 else (1, block)


class _Plan(NamedTuple):
    """What follows from shapes, strides and dtypes; remembered, since finding it out costs more than launching.

    `dtypes` are part of the key: Triton compiles for every type anew.
    """

    form: Form
    grid: tuple[int, int, int]
    groups: int
    copy_x: bool
    copy_gate: bool


def _check_floats(op: str, dtypes: tuple[torch.dtype | None, ...]) -> None:
    if any(dtype is not None and not dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"{op}: came {', '.join(str(dtype) for dtype in dtypes if dtype)}; legal: floating point")


@functools.lru_cache(maxsize=4096)
def _plan(op, shape, stride, gate_stride, dtypes, size, norm_first, devices) -> _Plan:
    """Several short groups share a program."""
    device = one_device(op, *devices)
    _check_floats(op, dtypes)
    x_stride, gated = row_stride(shape, stride), gate_stride is not None
    groups, (pieces, block) = shape.numel() // size, _tiles(size, gated)
    rows = max(1, min(1536 // (pieces * block), groups))
    rows = 1 << (rows.bit_length() - 1)
    gate_row_stride = row_stride(shape, gate_stride) if gated else 0
    pdl = dependent_launch(device)
    fixed = (
        shape[-1] if x_stride is None else x_stride, shape[-1] if gate_row_stride is None else gate_row_stride,
        shape[-1] // size, size, pieces, block, rows, gated, norm_first, pdl,
    )  # fmt: skip
    programs = -(-groups // rows)
    form = _norm.form(device, fixed, warps=_warps(programs, rows * pieces * block, gated, device), pdl=pdl)
    return _Plan(form, (programs, 1, 1), groups, x_stride is None, gate_row_stride is None)


def _normalize(op, x, weight, gate, eps, size, norm_first) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    kind = (None, None, x.device) if gate is None else (gate.stride(), gate.dtype, gate.device)
    gate_stride, gate_dtype, gate_device = kind
    dtypes, devices = (x.dtype, weight.dtype, gate_dtype), (x.device, weight.device, gate_device)
    plan = _plan(op, x.shape, x.stride(), gate_stride, dtypes, size, norm_first, devices)
    if plan.copy_x:
        x = x.contiguous()
    if gate is None:
        gate = x
    elif plan.copy_gate:
        gate = gate.contiguous()
    plan.form(plan.grid, (x, gate, weight.contiguous(), out), (eps, plan.groups))
    return out


def _like(input, *_args):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@operator(fake=_like, needs=(TRITON,), instead="torch_rmsnorm")
def triton_rms_norm(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x²) + eps), rounded once to x's dtype. input [..., H], weight [H] -> contiguous."""
    check_weight("triton_rms_norm", "input", input, weight)
    return _normalize("triton_rms_norm", input, weight, None, eps, input.shape[-1], False)


def _gated_like(x, weight, gate, eps, group_size, norm_before_gate=False):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(fake=_gated_like, needs=(TRITON,), instead="torch_rmsnorm_gated")
def triton_rmsnorm_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """Grouped RMS norm with a SiLU gate before or after it, as `torch_rmsnorm_gated`; contiguous, in x's dtype."""
    op = "triton_rmsnorm_gated"
    check_gated(op, x, weight, gate, group_size)
    return _normalize(op, x, weight, gate, eps, group_size, norm_before_gate)


@functools.lru_cache(maxsize=4096)
def _add_plan(shape, x_stride, residual_stride, dtypes, devices) -> tuple[Form, tuple[int, int, int]]:
    device = one_device("triton_fused_add_rms_norm_inplace", *devices)
    _check_floats("triton_fused_add_rms_norm_inplace", dtypes)
    strides = row_stride(shape, x_stride), row_stride(shape, residual_stride)
    if None in strides or (0 in strides and shape.numel() > shape[-1]):
        raise ValueError(
            "triton_fused_add_rms_norm_inplace: x and residual need rows of one stride, being written in place; came "
            f"{tuple(shape)} with strides {x_stride} and {residual_stride}"
        )
    size, pdl = shape[-1], dependent_launch(device)
    block, rows = 1 << (size - 1).bit_length(), shape.numel() // size
    form = _add_norm.form(device, (*strides, size, block, pdl), warps=_warps(rows, block, False, device), pdl=pdl)
    return form, (rows, 1, 1)


@operator(fake=add_norm_fake, mutates=("x", "residual"), needs=(TRITON,), instead="torch_fused_add_rms_norm_inplace")
def triton_fused_add_rms_norm_inplace(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """residual += x, then x = rmsnorm(residual) * weight, both in place, as `torch_fused_add_rms_norm_inplace`.

    The rows of x and of residual must have one stride each, as those of any slice of a projection's columns have.
    """
    check_add_norm("triton_fused_add_rms_norm_inplace", x, residual, weight)
    if x.numel() == 0:
        return
    dtypes, devices = (x.dtype, weight.dtype), (x.device, residual.device, weight.device)
    form, grid = _add_plan(x.shape, x.stride(), residual.stride(), dtypes, devices)
    form(grid, (x, residual, weight.contiguous()), (eps,))
