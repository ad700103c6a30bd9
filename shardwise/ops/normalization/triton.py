"""RMS norms as Triton kernels: one pass over memory, statistics and weight in float32, one rounding at the end."""

import functools

import torch

from shardwise.ops.normalization.reference import check_gated
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import Kernel, await_predecessor, dependent_launch, tl, triton


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
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # groups in a program
    GATED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (group < groups) & (column < SIZE)
    within = (group % PER_ROW) * SIZE + column
    await_predecessor(PDL)
    x = tl.load(x_ptr + (group // PER_ROW) * x_stride + within, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + within, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + (group // PER_ROW) * gate_stride + within, mask=mask, other=0.0).to(tl.float32)
        silu = gate * tl.sigmoid(gate)
        if not NORM_FIRST:
            x *= silu
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / SIZE + eps)
    out = x * scale * weight
    if GATED and NORM_FIRST:
        out *= silu
    tl.store(out_ptr + group * SIZE + column, out.to(out_ptr.dtype.element_ty), mask=mask)


_launch = Kernel(_norm_kernel)


@functools.lru_cache(maxsize=4096)
def _plan(shape: torch.Size, size: int, device: torch.device) -> tuple:
    """(groups, grid, constants, warps, pdl): several short groups share a program; warps by a sweep on an H200."""
    groups, block = shape.numel() // size, 1 << (size - 1).bit_length()
    rows = max(1, min(1024 // block, groups))
    rows = 1 << (rows.bit_length() - 1)
    warps = min(16, max(2, rows * block // 1024))
    constants = (shape[-1] // size, size, block, rows)
    return groups, ((groups + rows - 1) // rows, 1, 1), constants, warps, dependent_launch(device)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x`, or a contiguous copy where its rows have no common stride, and the stride between rows."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 and x.dim() >= 2 and x.shape[:-2].numel() == 1:
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


def _normalize(x, weight, gate, eps, size, norm_first) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    groups, grid, constants, warps, pdl = _plan(x.shape, size, x.device)
    x, x_stride = _rows(x)
    gated = gate is not None
    gate, gate_stride = _rows(gate) if gated else (x, 0)
    _launch(
        x.device,
        grid,
        (x, gate, weight.contiguous(), out),
        (eps, groups),
        (x_stride, gate_stride, *constants, gated, norm_first, pdl),
        warps=warps,
        pdl=pdl,
    )
    return out


def _like(input, *_args):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@operator(fake=_like, needs=(TRITON,), instead="torch_rmsnorm")
def triton_rms_norm(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x²) + eps), rounded once to x's dtype. input [..., H], weight [H] -> contiguous."""
    if weight.shape != input.shape[-1:]:
        raise ValueError(
            f"triton_rms_norm: weight {tuple(weight.shape)} does not match the last dimension of input "
            f"{tuple(input.shape)}"
        )
    return _normalize(input, weight, None, eps, input.shape[-1], False)


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
    check_gated("triton_rmsnorm_gated", x, weight, gate, group_size)
    return _normalize(x, weight, gate, eps, group_size, norm_before_gate)
