"""The gated RMS norm of a group of channels that lie on several ranks: each one's squares, and with their sum the norm.

Not registered operators: the runtime's state-space layers call them directly. CUDA, or Triton's interpreter.
"""

# Triton's language, not Python's, where the kernel's types are concerned.
# mypy: disable-error-code="assignment"

import torch

from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.triton_support import await_predecessor, dependent_launch, interpreting, tl, triton


@triton.jit(do_not_specialize=["eps", "number"])
def part_kernel(
    x_ptr,  # [T, I], rows x_row apart
    gate_ptr,  # [T, I], rows gate_row apart
    weight_ptr,  # [I]
    squares_ptr,  # float32 [T, GROUPS]
    out_ptr,  # [T, I]
    number,
    eps,
    x_row: tl.constexpr,
    gate_row: tl.constexpr,
    I: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    AFTER: tl.constexpr,
    APPLY: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < I
    weight = 1.0
    if APPLY:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    await_predecessor(PDL)
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if APPLY or not AFTER:
        gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        gate *= tl.sigmoid(gate)
        if not AFTER:
            x *= gate
    if APPLY:
        mean = tl.load(squares_ptr + row * GROUPS + number) / SIZE
        x *= tl.rsqrt(mean + eps) * weight
        if AFTER:
            x *= gate
        tl.store(out_ptr + row * I + column, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        group = tl.arange(0, WIDE)
        own = tl.where(group == number, tl.sum(x * x, 0), 0.0)
        tl.store(squares_ptr + row * GROUPS + group, own, mask=group < GROUPS)


_part = Kernel(part_kernel)


def squares_of_part(x: torch.Tensor, gate: torch.Tensor, *, groups: int, number: int, after: bool) -> torch.Tensor:
    """float32 [T, groups]: in column `number` the sum of squares of each row of x * silu(gate), or of x where the gate
    comes `after` the norm; zero in the others.

    x, gate [T, I] of one dtype, with contiguous rows.
    """
    squares = torch.empty(len(x), groups, dtype=torch.float32, device=x.device)
    _launch(x, gate, x, squares, x, 1, number, 0.0, after, apply=False)
    return squares


def norm_of_part(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, squares: torch.Tensor,
    *, number: int, size: int, eps: float, after: bool,
) -> torch.Tensor:  # fmt: skip
    """x * silu(gate) [T, I] normed by the group's mean of squares and scaled by weight [I], or the gate `after` that.

    squares [T, groups] of all ranks, of which column `number` counts; `size`: channels of the group. Contiguous, in x's
    dtype.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, gate, weight, squares, out, size, number, eps, after, apply=True)
    return out


def _launch(x, gate, weight, squares, out, size, number, eps, after, *, apply: bool) -> None:
    rows, width = x.shape
    if gate.shape != x.shape or x.stride(1) != 1 or gate.stride(1) != 1:
        raise ValueError(f"gated norm of a part: x and gate of one shape with contiguous rows, came {x.shape}, "
                         f"{x.stride()} and {gate.shape}, {gate.stride()}")  # fmt: skip
    pdl = dependent_launch(x.device) and not interpreting()
    block, groups = triton.next_power_of_2(width), squares.shape[1]
    fixed = x.stride(0), gate.stride(0), width, size, groups, block, triton.next_power_of_2(groups), after, apply, pdl
    pointers = x, gate, weight, squares, out
    form = _part.form_for(x.device, pointers, fixed, warps=16 if block > 4096 else 8, pdl=pdl)
    form((rows, 1, 1), pointers, (number, eps))
