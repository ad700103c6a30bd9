"""Collectives for graphs, by whatever transport the current group has. `strategy` is checked and otherwise ignored."""

from typing import Optional

import torch

from shardwise.comm.names import require_strategy_name
from shardwise.ops.distributed.group import gathered, group_of
from shardwise.ops.registry import operator


def _gather_fake(tensor, dim=0, sizes=None):
    return gathered(tensor, dim, sizes)


@operator(fake=_gather_fake)
def torch_dist_all_gather(
    tensor: torch.Tensor,
    dim: int = 0,
    sizes: Optional[list[int]] = None,  # noqa: UP045 - infer_schema of the oldest supported torch wants it so
) -> torch.Tensor:
    """All ranks' tensors joined along `dim`; `sizes` holds each rank's length on it (None: all equal).

    tensor [..., n, ...] any dtype. ValueError when sizes does not match this rank's tensor.
    """
    return group_of(tensor).all_gather(tensor, dim, sizes)


def _reduce_fake(t, strategy):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


@operator(fake=_reduce_fake)
def torch_dist_all_reduce(t: torch.Tensor, strategy: str) -> torch.Tensor:
    """Sum of all ranks' `t`, a new tensor. 16-bit floats accumulate in float32.

    `strategy` must be a known name (ValueError otherwise) and has no other effect: the group's transport chooses;
    `trtllm_dist_all_reduce` honours it.
    """
    require_strategy_name(strategy)
    return group_of(t).all_reduce(t)
