"""The group that the distributed operators run on: they take none as an argument."""

from torch import Tensor

from shardwise.comm.rank import current_groups
from shardwise.comm.strategy import default_group, default_size


def group_of(tensor: Tensor):
    """The current tensor-parallel group; without one torch.distributed's default group; else one rank."""
    groups = current_groups()
    return groups.tp if groups is not None else default_group(tensor.device.type)


def size() -> int:
    """Ranks of that group, without making it."""
    groups = current_groups()
    return groups.tp.size if groups is not None else default_size()


def gathered(tensor: Tensor, dim: int, sizes: list[int] | None) -> Tensor:
    """Empty result of an all-gather."""
    shape = list(tensor.shape)
    shape[dim] = sum(sizes) if sizes is not None else shape[dim] * size()
    return tensor.new_empty(shape)
