"""The calls that `bench.py` times: their tensors, and what must come out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIDDEN = 4096
"""Elements of a row that is normed."""


@dataclass(frozen=True)
class Case:
    """A call to time, one whose result is looked at, and what that must be."""

    call: Callable[[], Any]
    verify: Callable[[], Tensor]
    expected: Tensor


def shared_elements(size: int, dtype: torch.dtype, world: int) -> int:
    """Elements of about `size` bytes that `world` ranks can share evenly."""
    return max(world, size // dtype.itemsize // world * world)


def moved_bytes(op: str, size: int, dtype: torch.dtype, world: int) -> int:
    """Bytes of the tensor that serves for `size`: whole elements for every rank, for a norm whole rows."""
    count = shared_elements(size, dtype, world)
    if op == "all_reduce_residual_rms_norm":
        count = max(1, count // HIDDEN) * HIDDEN
    return count * dtype.itemsize


def make_case(op: str, size: int, dtype: torch.dtype, group, device: str, strategy: str) -> Case:
    """`op` on `moved_bytes` of `size`. Inputs are small integers, so that sums are exact in every dtype."""
    world, rank = group.size, group.rank
    count = shared_elements(size, dtype, world)
    pattern = torch.arange(count, device=device) % 5
    mine = (pattern + rank).to(dtype)
    total = (pattern * world + world * (world - 1) // 2).to(dtype)
    part = count // world
    if op == "all_reduce":
        zeros = torch.zeros_like(mine)  # in place, as layers call it: zeros stay small however often they are added
        return Case(
            lambda: group.all_reduce(zeros, out=zeros, strategy=strategy),
            lambda: group.all_reduce(mine, strategy=strategy),
            total,
        )
    if op == "all_gather":
        everyone = torch.cat([(pattern[:part] + r).to(dtype) for r in range(world)])
        source = mine[:part].clone()
        return _repeated(lambda: group.all_gather(source), everyone)
    if op == "reduce_scatter":
        return _repeated(lambda: group.reduce_scatter(mine), total[rank * part : (rank + 1) * part])
    if op == "all_to_all":
        received = torch.cat([(pattern[rank * part : (rank + 1) * part] + r).to(dtype) for r in range(world)])
        return _repeated(lambda: group.all_to_all(mine), received)
    if op == "broadcast":
        return _repeated(lambda: group.broadcast(mine, 0), pattern.to(dtype))
    return _norm_case(count, dtype, group, device, strategy)


def _repeated(call: Callable[[], Tensor], expected: Tensor) -> Case:
    return Case(call, call, expected)


def _norm_case(count: int, dtype: torch.dtype, group, device: str, strategy: str) -> Case:
    tokens = max(1, count // HIDDEN)
    x = torch.ones((tokens, HIDDEN), dtype=dtype, device=device)
    residual, weight = torch.ones_like(x), torch.ones(HIDDEN, dtype=dtype, device=device)

    def call():
        return group.all_reduce_residual_rms_norm(x, residual, weight, 0.0, strategy=strategy)[0]

    return _repeated(call, torch.ones_like(x))
