"""Reading a rank's shards into a GPU's memory, by several threads and ahead of their use.

Each thread reads pieces of a file into pinned memory of its own and copies them to the device on a stream of its own,
one buffer being read while the other is on its way. At most `WINDOW_BYTES` wait on the device for the layers that take
them, so the host holds the threads' buffers and nothing else.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardwise.sharding.axes import Range, span
from shardwise.sharding.checkpoint.gguf_model import StoredTensor
from shardwise.sharding.checkpoint.reader import Reader
from shardwise.sharding.shards import TensorShard

Ranges = Sequence[Sequence[Range]]
WINDOW_BYTES = 1 << 30
"""Longer than the tensors of one layer, within which layers take them in another order than they are read."""
PIECE_BYTES = 8 << 20
THREADS = 8
"""Per rank, fewer where ranks share the cores; one thread copies 5 to 10 GB/s out of the page cache."""
LEAST_THREADS = 4


class ReadAhead:
    """Hands out shards of `order` as they are stored; others too, without having read them ahead.

    locate   the tensor that holds a shard, and its index ranges there
    world    ranks that share this host's cores
    """

    def __init__(
        self,
        reader: Reader,
        locate: Callable[[TensorShard], tuple[StoredTensor, Ranges]],
        order: Iterable[TensorShard],
        device: torch.device,
        *,
        world: int = 1,
        window: int = WINDOW_BYTES,
    ):
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._reader, self._locate, self._device, self._window = reader, locate, device, window
        cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(max(LEAST_THREADS, min(THREADS, cores // world)), "shardwise-read")
        self._lanes = threading.local()
        self._used: list[_Lane] = []
        self._order = deque(order)
        self._pending: dict[str, _Pending] = {}
        self._taken: set[str] = set()
        self._ahead = 0

    def take(self, shard: TensorShard) -> Tensor:
        """The shard without padding, in its storage type (bits where NumPy lacks it, float32 where it is quantised)."""
        self._submit_ahead()
        pending = self._pending.pop(shard.name, None)
        if pending is None:
            pending = self._submit(shard)
        else:
            self._ahead -= pending.tensor.nbytes
        self._taken.add(shard.name)
        for part in pending.parts:
            copied = part.result()
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
        self._reader.release(pending.stored)
        return pending.tensor

    def close(self) -> None:
        """Nothing is on its way to the device when this returns: the memory is free for others."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for lane in self._used:
            lane.synchronize()
        self._pending.clear()

    def _submit_ahead(self) -> None:
        while self._order and self._ahead < self._window:
            shard = self._order.popleft()
            if shard.name not in self._taken and shard.held:
                pending = self._pending[shard.name] = self._submit(shard)
                self._ahead += pending.tensor.nbytes

    def _submit(self, shard: TensorShard) -> "_Pending":
        stored, ranges = self._locate(shard)
        dtype = self._reader.array_type(stored)
        shape = tuple(map(span, ranges)) or (1,)
        tensor = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=self._device)
        free = None
        if tensor.is_cuda:  # the memory may have belonged to work that the device has not done yet
            free = torch.cuda.Event()
            free.record()
        pieces = self._reader.cut(stored, ranges, PIECE_BYTES // dtype.itemsize) if tensor.numel() else ()
        parts = [
            self._pool.submit(self._read, stored, inside, tensor[start:stop], free) for (start, stop), inside in pieces
        ]
        return _Pending(stored, tensor, parts)

    def _read(self, stored: StoredTensor, ranges: Ranges, target: Tensor, free: torch.cuda.Event | None):
        if not hasattr(self._lanes, "lane"):
            self._lanes.lane = _Lane(self._device)
            self._used.append(self._lanes.lane)
        lane: _Lane = self._lanes.lane
        with torch.inference_mode():  # which is a thread's own, and whose tensors may be written in no other
            return lane.move(lambda into: self._reader.read(stored, ranges, into), target, free)


@dataclass(frozen=True)
class _Pending:
    """A tensor on the device, and the pieces that are on their way into it."""

    stored: StoredTensor
    tensor: Tensor
    parts: list[Future]


class _Lane:
    """One thread's way to the device: two buffers and a stream."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        if self._cuda:  # new threads begin on device 0
            torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def move(self, read: Callable[[np.ndarray], None], target: Tensor, free: torch.cuda.Event | None):
        """`read` fills host memory, which then goes into contiguous `target`. Returns the copy's event, on a GPU."""
        self._buffers.reverse()
        self._copied.reverse()
        copied = self._copied[0]
        if copied is not None:
            copied.synchronize()
        if self._buffers[0].numel() < target.nbytes:
            self._buffers[0] = torch.empty(max(target.nbytes, PIECE_BYTES), dtype=torch.uint8, pin_memory=self._cuda)
        buffer = self._buffers[0][: target.nbytes]
        read(buffer.numpy())
        bits = target.view(-1).view(torch.uint8)
        if self._stream is None or free is None:
            bits.copy_(buffer)
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            bits.copy_(buffer, non_blocking=True)
            copied = self._copied[0] = torch.cuda.Event()
            copied.record(self._stream)
        return copied

    def synchronize(self) -> None:
        """Wait until the device has all that was read."""
        if self._stream is not None:
            self._stream.synchronize()
