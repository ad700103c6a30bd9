"""L2 norm of the flash-linear-attention package."""

import torch

from shardwise.ops.registry import FLA, operator


@operator(
    fake=lambda x, eps=1e-6: torch.empty_like(x, memory_format=torch.contiguous_format),
    needs=(FLA,),
    instead="torch_l2norm",
)
def fla_l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(sum(x²) + eps) over the last dimension, result contiguous in x's dtype. x [..., D]."""
    from fla.modules.l2norm import l2norm

    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return l2norm(x.contiguous().view(-1).view(x.shape), eps)  # strides of 1, also of a single column
