"""FlashInfer's CUTLASS kernels of a mixture of experts: whether its compiled module is there, and calls of it.

FlashInfer would compile its Hopper module (CUTLASS grouped GEMMs) on the first call, which takes an hour or more, so
nothing here starts that: `build_cutlass_moe` does, once, and later processes find the result. `shardwise ops` says
which kernels serve. Outside of FlashInfer's `autotune` the module takes its first shapes, which have no fused finalize.
Inside it may pick one that adds the experts' results with float atomics, and bits may then differ between runs;
FlashInfer 0.6 has no argument against that. The Triton kernels' bits do not differ.
"""

import functools

import torch
from torch import Tensor

from shardwise.ops.registry import TRITON, Need
from shardwise.ops.vector_access import with_vectors


def build_cutlass_moe() -> None:
    """Compile FlashInfer's module for this GPU (Hopper); many minutes, kept in FlashInfer's cache."""
    from flashinfer.fused_moe.core import gen_cutlass_fused_moe_sm90_module

    gen_cutlass_fused_moe_sm90_module().build_and_load()
    cutlass_state.cache_clear()


def cutlass_ready() -> bool:
    """Whether FlashInfer's module can run: this is Hopper and the module was compiled before."""
    return cutlass_state()[0]


@functools.cache
def cutlass_state() -> tuple[bool, str]:
    """(ready, what is there or missing)."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return False, f"FlashInfer's module is for compute capability 9.0, this is {capability[0]}.{capability[1]}"
    try:
        from flashinfer.fused_moe.core import gen_cutlass_fused_moe_sm90_module
    except ImportError as error:
        return False, f"flashinfer-python cannot be imported ({error})"
    if not gen_cutlass_fused_moe_sm90_module().is_compiled:
        return False, "FlashInfer's module is not compiled (shardwise.ops.moe.cutlass.build_cutlass_moe does it once)"
    return True, "FlashInfer's CUTLASS kernels"


def _kernels() -> tuple[bool, str]:
    present, reason = TRITON.state
    ready, what = cutlass_state()
    return present, f"{reason}: {what if ready else f'our Triton kernels, as {what}'}" if present else reason


KERNELS = Need("FlashInfer's CUTLASS or our Triton kernels", _kernels, on_cpu=TRITON.on_cpu)


def on_cutlass(rows: Tensor, first: Tensor, second: Tensor, on_input: bool) -> bool:
    """Whether FlashInfer's kernels take this call: 16-bit rows, not none of them, no routing weights on the input, both
    stacked weights at multiples of 16 bytes, and rows of the second [E, H, I], as of its transpose, of such multiples.
    """
    begins, item = first.data_ptr() | second.data_ptr(), second.element_size()
    fits = begins % 16 == 0 and all(size * item % 16 == 0 for size in second.shape[1:])
    taken = rows.dtype in (torch.bfloat16, torch.float16) and rows.shape[0] > 0 and fits and not on_input
    return rows.is_cuda and taken and cutlass_ready()


def cutlass_moe(rows, ids, weights, first, second, act, dtype, scales) -> Tensor:
    """FlashInfer's operator on the rows; it skips ids that are not local experts."""
    from flashinfer.fused_moe import ActivationType, cutlass_fused_moe

    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    ids, weights = _merged(ids.to(torch.int32), weights.float(), first.shape[0])
    cutlass_fused_moe(
        with_vectors(rows),
        ids,
        weights,
        first,
        second,
        dtype,
        quant_scales=scales,
        output=out,
        activation_type=ActivationType.Swiglu if act == "silu" else ActivationType.Relu2,
    )
    return out


def _merged(ids: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Routing in which no token names an expert twice: the first of equal ids has the sum of their weights, others are
    `experts`, which is none. With more than 256 tokens the module loses an id that repeats and reads past its buffers.
    """
    same = ids[:, :, None] == ids[:, None, :]
    again = same.tril(-1).any(2)
    return torch.where(again, experts, ids), torch.where(same, weights[:, None, :], 0.0).sum(2)
