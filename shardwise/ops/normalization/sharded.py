"""RMS norm of a hidden dimension that is split over the ranks of the tensor-parallel group."""

import torch
import torch.distributed as dist

from shardwise.comm.rank import current_groups
from shardwise.ops.dtypes import check_float
from shardwise.ops.normalization.reference import check_weight
from shardwise.ops.registry import operator


def _like(input, weight, eps, world_size):
    return torch.empty_like(input)


@operator(fake=_like, instead="torch_rmsnorm")
def sharded_rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float, world_size: int) -> torch.Tensor:
    """weight * x / sqrt(mean(x²) + eps) with the mean over the whole dimension.

    input [..., h] and weight [h] are this rank's part; parts may differ in length and count by it. The group is the
    current tensor-parallel group, else torch.distributed's default group, and must have `world_size` ranks.
    """
    check_weight("sharded_rmsnorm", "input", input, weight)
    check_float("sharded_rmsnorm", "input", input)
    wide = input.float()
    squares = wide.square().sum(-1, keepdim=True)
    # The length rides along, so that uneven parts weigh right without a second collective. A kernel writes it: a copy
    # of Python's number would wait for the device.
    sums = torch.cat((squares.flatten(), squares.new_full((1,), input.shape[-1])))
    sums = _all_reduce(sums, world_size)
    mean = (sums[:-1] / sums[-1]).view(squares.shape)
    result = (wide * torch.rsqrt(mean + eps)).to(input.dtype) * weight
    if result.dtype == input.dtype and result.stride() == input.stride():
        return result
    return torch.empty_like(input).copy_(result)


def _all_reduce(sums: torch.Tensor, world_size: int) -> torch.Tensor:
    groups = current_groups()
    default = groups is None and dist.is_available() and dist.is_initialized()
    size = groups.tp.size if groups is not None else dist.get_world_size() if default else 1
    if size != world_size:
        raise ValueError(
            f"sharded_rmsnorm: world_size = {world_size}, but the current tensor-parallel group has {size} ranks; "
            "run inside shardwise.comm.rank.use_groups or initialise torch.distributed"
        )
    if groups is not None:
        return groups.tp.all_reduce(sums)
    if default:
        dist.all_reduce(sums)
    return sums
