"""Collectives with TensorRT-LLM's names and strategies: `strategy` is honoured, or refused with the reason."""

from typing import Optional

import torch

from shardwise.ops.distributed.group import gathered, group_of
from shardwise.ops.dtypes import check_float
from shardwise.ops.registry import operator


def _gather_fake(tensor, dim=0, sizes=None):
    return gathered(tensor, dim, sizes)


@operator(fake=_gather_fake, instead="torch_dist_all_gather")
def trtllm_dist_all_gather(
    tensor: torch.Tensor,
    dim: int = 0,
    sizes: Optional[list[int]] = None,  # noqa: UP045
) -> torch.Tensor:
    """All ranks' tensors joined along `dim`; `sizes` holds each rank's length on it (None: all equal)."""
    return group_of(tensor).all_gather(tensor, dim, sizes)


def _reduce_fake(t, strategy):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


@operator(fake=_reduce_fake, instead="torch_dist_all_reduce")
def trtllm_dist_all_reduce(t: torch.Tensor, strategy: str) -> torch.Tensor:
    """Sum of all ranks' `t`, a new tensor, by `strategy` (AUTO, NCCL, ONESHOT, TWOSHOT, MIN_LATENCY, ...).

    ValueError for an unknown name; CommError with the reason for a strategy that cannot run here.
    """
    return group_of(t).all_reduce(t, strategy=strategy)


def _fused_fake(tensor, residual, norm_weight, eps, strategy):
    return (
        torch.empty_like(tensor, memory_format=torch.contiguous_format),
        torch.empty_like(tensor, memory_format=torch.contiguous_format),
    )


@operator(fake=_fused_fake, namespace="dist")
def trtllm_fused_allreduce_residual_rmsnorm(
    tensor: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    strategy: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rmsnorm(s) * norm_weight, s) with s = all_reduce(tensor) + residual.

    tensor, residual [..., H], norm_weight [H]. One kernel where the group's transport has it. Errors as above.
    """
    check_float("trtllm_fused_allreduce_residual_rmsnorm", "tensor", tensor)
    return group_of(tensor).all_reduce_residual_rms_norm(tensor, residual, norm_weight, eps, strategy=strategy)
