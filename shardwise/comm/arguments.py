"""Checks of what callers pass to a collective, the same for all transports."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise import partition


def reduce_target(tensor: Tensor, out: Tensor | None) -> Tensor:
    """Where an all-reduce writes: `out`, which must be like `tensor`, or a new tensor."""
    if out is None:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if out.shape != tensor.shape or out.dtype != tensor.dtype or out.device != tensor.device:
        raise ValueError(
            f"all_reduce: out is {tuple(out.shape)} {out.dtype} on {out.device}, it must be like tensor: "
            f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    return out.detach()


def dimension(tensor: Tensor, dim: int, op: str) -> int:
    """`dim` counted from the front."""
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"{op}: dim {dim} is not in a tensor of shape {tuple(tensor.shape)}")
    return dim % tensor.dim()


def gather_sizes(tensor: Tensor, dim: int, sizes: Sequence[int] | None, rank: int, world: int) -> tuple[int, ...]:
    """Every rank's length on `dim`."""
    if sizes is None:
        return (tensor.shape[dim],) * world
    sizes = tuple(int(size) for size in sizes)
    if len(sizes) != world or min(sizes) < 0:
        raise ValueError(f"all_gather: sizes {sizes} must hold one length for each of the {world} ranks")
    if sizes[rank] != tensor.shape[dim]:
        raise ValueError(
            f"all_gather: sizes[{rank}] = {sizes[rank]}, but this rank's tensor has {tensor.shape[dim]} "
            f"on dim {dim} (shape {tuple(tensor.shape)})"
        )
    return sizes


def scatter_sizes(tensor: Tensor, dim: int, sizes: Sequence[int] | None, world: int) -> tuple[int, ...]:
    """Every rank's length of `dim` after a reduce-scatter."""
    if sizes is None:
        return partition.lengths(tensor.shape[dim], world)
    sizes = tuple(int(size) for size in sizes)
    if len(sizes) != world or min(sizes) < 0 or sum(sizes) != tensor.shape[dim]:
        raise ValueError(
            f"reduce_scatter: sizes {sizes} must hold {world} lengths that add up to {tensor.shape[dim]} "
            f"(dim {dim} of shape {tuple(tensor.shape)})"
        )
    return sizes


Sizes = tuple[int, ...]


def exchanged_sizes(
    tensor: Tensor, sends: Sequence[int] | None, receives: Sequence[int] | None, world: int
) -> tuple[Sizes, Sizes | None]:
    """How many rows this rank sends to each member and receives from it, None where the caller does not know."""
    if tensor.dim() == 0:
        raise ValueError("all_to_all: a scalar has no rows to deal; give a tensor of at least one dimension")
    rows = tensor.shape[0]
    if sends is None:
        if receives is not None:
            raise ValueError("all_to_all: recv_sizes without send_sizes; give both, send_sizes alone, or neither")
        if rows % world:
            raise ValueError(
                f"all_to_all: {rows} rows cannot be dealt equally to {world} ranks; give send_sizes for ragged parts"
            )
        equal = (rows // world,) * world
        return equal, equal
    sends = tuple(int(count) for count in sends)
    if len(sends) != world or min(sends) < 0 or sum(sends) != rows:
        raise ValueError(f"all_to_all: send_sizes {sends} must hold {world} counts that add up to {rows} rows")
    if receives is None:
        return sends, None
    receives = tuple(int(count) for count in receives)
    if len(receives) != world or min(receives) < 0:
        raise ValueError(f"all_to_all: recv_sizes {receives} must hold {world} counts")
    return sends, receives


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor (of its contiguous copy, if it is not contiguous) as flat uint8."""
    flat = (tensor.detach() if tensor.requires_grad else tensor).contiguous()
    flat = flat if flat.dim() == 1 else flat.view(-1)
    if flat.numel() < 2:  # contiguous with any stride, but bytes are not seen through each
        flat = flat.as_strided(flat.shape, (1,))
    return flat.view(torch.uint8)


def unit_elements(tensor: Tensor, dim: int) -> int:
    """Elements of a slice of length 1 on `dim`."""
    return math.prod(tensor.shape[:dim] + tensor.shape[dim + 1 :])


def starts(counts: Sequence[int]) -> list[int]:
    """Where each part begins in the memory that holds them concatenated."""
    places = [0]
    for count in counts[:-1]:
        places.append(places[-1] + count)
    return places
