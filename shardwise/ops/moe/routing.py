"""Host side of routing: pairs grouped by expert, and the weighted sum of their results."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.moe.routing_kernels import combine_kernel, group_kernel
from shardwise.ops.triton_support import Launcher, aligned, dependent_launch

_group, _combine = Launcher(group_kernel), Launcher(combine_kernel)


@dataclass(frozen=True)
class Routing:
    """What the GEMMs and the sum need to know of the routing."""

    ids: Tensor  # int32 [T, K], global
    weights: Tensor  # float32 [T, K]
    order: Tensor  # int32 [T * K], pairs by expert
    blocks: Tensor  # int32 [1 + 3 * blocks]
    first: int
    local: int


def group_pairs(routing: Routing, block: int) -> None:
    """Fill `order` and `blocks` from `ids`."""
    pairs, device = routing.ids.numel(), routing.ids.device
    pdl = dependent_launch(device)
    chunk = min(4096, max(128, power_of_two(pairs)))
    constants = (chunk, power_of_two(routing.local + 1), block, pdl)
    key = (routing.ids.dtype, aligned(routing.ids), constants)
    args = (routing.ids, routing.order, routing.blocks, pairs, routing.first, routing.local)
    _group(device, key, (routing.local, 1, 1), args + constants, num_warps=4 if chunk < 2048 else 8, launch_pdl=pdl)


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """Upper bound of the token blocks of any routing: the grid must not depend on values on the device."""
    return min(pairs, experts) + pairs // block


def combine(values: Tensor, routing: Routing, dtype: torch.dtype, weighted: bool = True) -> Tensor:
    """[T, H] from values [splits, T * K, H]: sum over a token's local pairs, times the routing weight."""
    splits, pairs, hidden = values.shape
    count, top_k = routing.ids.shape
    out = torch.empty((count, hidden), dtype=dtype, device=values.device)
    device, pdl = values.device, dependent_launch(values.device)
    block = 512 if count <= 64 else 1024
    constants = (top_k, splits, block, weighted, pdl)
    key = (values.dtype, routing.ids.dtype, routing.weights.dtype, dtype, aligned(routing.ids, routing.weights))
    _combine(
        device,
        (*key, hidden, constants),
        (count, -(-hidden // block), 1),
        (values, routing.ids, routing.weights, out, pairs, routing.first, routing.local, hidden) + constants,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


_COUNTS: dict[torch.device, int] = {}


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 for the interpreter."""
    if device not in _COUNTS:
        cuda = device.type == "cuda"
        _COUNTS[device] = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 2
    return _COUNTS[device]
