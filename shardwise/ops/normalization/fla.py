"""L2 norm of the flash-linear-attention package."""

import functools
from collections.abc import Callable

import torch

from shardwise.ops.registry import FLA, operator


@functools.cache
def _function() -> Callable:
    from fla.modules.l2norm import l2norm

    return l2norm


@operator(
    fake=lambda x, eps=1e-6: torch.empty_like(x, memory_format=torch.contiguous_format),
    needs=(FLA,),
    instead="torch_l2norm",
)
def fla_l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(sum(x²) + eps) over the last dimension, result contiguous in x's dtype. x [..., D]."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.is_contiguous() or x.stride(-1) != 1:
        x = x.contiguous().view(-1).view(x.shape)  # strides of 1, also of a single column
    return _function()(x, eps)
