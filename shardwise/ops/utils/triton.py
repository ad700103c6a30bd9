"""Gather and scatter in one Triton kernel, for tokens of overlapped batches that are fixed up on the device."""

import torch

from shardwise.ops.devices import require_one_device
from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import await_predecessor, dependent_launch, tl, triton
from shardwise.ops.utils.reference import check_pairs, nothing

_BLOCK = 1024


@triton.jit(do_not_specialize=["count", "source_size", "target_size"])
def _kernel(
    source_ptr,
    gather_ptr,
    scatter_ptr,
    out_ptr,
    count,
    source_size,
    target_size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    await_predecessor(PDL)
    gather = tl.load(gather_ptr + i, mask=i < count, other=-1).to(tl.int64)
    scatter = tl.load(scatter_ptr + i, mask=i < count, other=-1).to(tl.int64)
    valid = (gather >= 0) & (gather < source_size) & (scatter >= 0) & (scatter < target_size)
    tl.store(out_ptr + scatter, tl.load(source_ptr + gather, mask=valid, other=0), mask=valid)


_launch = Kernel(_kernel)


@operator(fake=nothing, mutates=("out",), needs=(TRITON,), instead="torch_utils_fused_gather_scatter")
def triton_utils_fused_gather_scatter(
    ungathered_input: torch.Tensor, gather_ids: torch.Tensor, mask_indices: torch.Tensor, out: torch.Tensor
) -> None:
    """out.view(-1)[mask_indices[i]] = ungathered_input.view(-1)[gather_ids[i]], in place.

    gather_ids, mask_indices: int32 or int64; entries of mask_indices behind the last of gather_ids are not read. Pairs
    with an index out of range are skipped.
    """
    op = "triton_utils_fused_gather_scatter"
    check_pairs(op, gather_ids, mask_indices, out)
    require_one_device(op, ungathered_input, gather_ids, mask_indices, out)
    source, gather, scatter = ungathered_input.contiguous(), gather_ids.contiguous(), mask_indices.contiguous()
    count = gather.numel()
    pdl = dependent_launch(out.device)
    _launch(
        out.device,
        ((count + _BLOCK - 1) // _BLOCK, 1, 1),
        (source, gather, scatter, out),
        (count, source.numel(), out.numel()),
        (_BLOCK, pdl),
        warps=4,
        pdl=pdl,
    )
