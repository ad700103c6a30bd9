"""SwiGLU MLP whose activation is one Triton kernel; the products stay PyTorch's."""

import torch
from torch.nn.functional import linear

from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.swiglu.reference import check_separate, like_input
from shardwise.ops.triton_support import await_predecessor, dependent_launch, tl, triton

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def _activate_kernel(gate_ptr, up_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """gate becomes silu(gate) * up."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    await_predecessor(PDL)
    gate = tl.load(gate_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(gate_ptr + i, (gate * tl.sigmoid(gate) * up).to(gate_ptr.dtype.element_ty), mask=i < count)


_launch = Kernel(_activate_kernel)


@operator(fake=like_input, needs=(TRITON,), instead="torch_swiglu_mlp")
def triton_swiglu_mlp(
    input: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `torch_swiglu_mlp`; silu(gate) * up in float32, rounded once."""
    check_separate(
        "triton_swiglu_mlp", input, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias
    )  # fmt: skip
    gate, up = linear(input, gate_weight, gate_bias), linear(input, up_weight, up_bias)
    count, device = gate.numel(), gate.device
    pdl = dependent_launch(device)
    _launch(device, (-(-count // _BLOCK), 1, 1), (gate, up), (count,), (_BLOCK, pdl), warps=4, pdl=pdl)
    hidden = gate.detach() if gate.requires_grad else gate  # PyTorch has not seen the kernel
    return linear(hidden, down_weight, down_bias)
