"""Strategy SYMM_MEM: torch's symmetric memory, its one-shot and two-shot all-reduce. Never its multimem operators.

The operators read peers' memory, so tensors are copied into a buffer that all ranks share. They add bfloat16 in
bfloat16 and have no deadline.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.comm.base import CommError

BUFFER_BYTES = 32 << 20
ONE_SHOT_BYTES = 128 << 10
"""Above it two-shot is the faster one on two Hopper GPUs (benchmarks/gpu_all_reduce.md)."""
WORLDS = (2, 4, 8)
DTYPES = (torch.bfloat16, torch.float32)
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class SymmetricMemory:
    """One rank's part of the buffer. Every rank of `group` makes one at the same call."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, tell: Callable[[Any], list[Any]]):
        """torch exchanges what it needs itself: `tell` is not used."""
        self.name, self.size = group.group_name, group.size()
        self.buffer = shared_buffer(BUFFER_BYTES, group, device)

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """target = sum of source over the ranks. Flat, contiguous, a dtype of DTYPES."""
        limit = BUFFER_BYTES // source.element_size()
        for part, result in zip(source.split(limit), target.split(limit), strict=True):
            self._reduce_part(part, result)

    def close(self) -> None:
        """torch keeps the memory until the process ends."""

    def _reduce_part(self, source: Tensor, target: Tensor) -> None:
        count = source.numel()
        padded = -(-source.nbytes // (16 * self.size)) * 16 * self.size // source.element_size()
        buffer = self.buffer.view(source.dtype)[:padded]
        buffer[:count].copy_(source)
        buffer[count:].zero_()
        if source.nbytes <= ONE_SHOT_BYTES:
            result = torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", self.name)
        else:
            result = torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self.name)
        target.copy_(result[:count])


def shared_buffer(nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Bytes that every rank of `group` may read; called by all of them."""
    import torch.distributed._symmetric_memory as library

    buffer = library.empty(nbytes, dtype=torch.uint8, device=device)
    library.rendezvous(buffer, group.group_name)
    return buffer


def obstacle(size: int, capturing: bool) -> str | None:
    """Why this rank cannot make a SymmetricMemory now."""
    if os.environ.get(_NO_MULTICAST) != "1":
        return f"{_NO_MULTICAST}=1 must be set before torch is imported: its memory is bound to multicast otherwise"
    if size not in WORLDS:
        return f"torch's operators take groups of 2, 4 or 8 ranks, not {size}"
    if capturing:
        return "its buffer cannot be made while a graph is captured: call it once before"
    return None


def require_dtype(dtype: torch.dtype) -> None:
    """CommError for a dtype that torch's operators do not add."""
    if dtype not in DTYPES:
        raise CommError(f"strategy SYMM_MEM sums bfloat16 and float32, not {dtype}; use AUTO")
