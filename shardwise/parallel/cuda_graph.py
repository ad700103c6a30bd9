"""Decode steps as CUDA graphs: one captured for each padded batch size, replayed with new inputs."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.ops.linear.vocab import PAGE
from shardwise.parallel.batch import Batch
from shardwise.parallel.decode_step import DecodeStep
from shardwise.parallel.trace import watched_by

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""A batch runs in the graph of the next size; the rows in between are padding, which reads and writes no cache."""
IN_FLIGHT = 3
"""Buffers on the host: one step runs, one is launched after it, and one is being filled."""


@dataclass(frozen=True)
class Flight:
    """A step that was launched. Its logits are valid until the next launch, its tokens until the one after that."""

    logits: Tensor
    """[B, columns of this rank]"""
    _tokens: Tensor
    _done: Any

    def tokens(self) -> list[int]:
        """Each row's greedy token, once the step is done."""
        if self._done is not None:
            self._done.synchronize()
        return self._tokens.tolist()


class DecodeGraphs:
    """Runs batches of one-token spans. All ranks must run the same batches.

    capture  False: the step is launched kernel by kernel
    """

    def __init__(self, step: DecodeStep, *, max_batch: int, capture: bool):
        self.step, self.capture = step, capture
        self.sizes = tuple(s for s in BATCH_SIZES if s < max_batch) + (max_batch,)
        self._device = step.cache.device
        self._cuda = self._device.type == "cuda"
        self._rows = PAGE + len(step.cache.page_tables)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: Any = None
        """Memory that all graphs share; they never run at once."""
        self._buffers = [_Buffer(self._rows, max_batch, self._cuda) for _ in range(IN_FLIGHT)]
        self._launches = 0

    @property
    def captured(self) -> tuple[int, ...]:
        """Batch sizes that have a graph."""
        return tuple(sorted(self._graphs))

    def launch(self, batch: Batch, sources: Sequence[int] | None = None) -> Flight:
        """Start a step. `sources`: rows of the last step, whose tokens, still on the device, this one begins with."""
        count = len(batch.spans)
        size = self._size(count)
        buffer = self._buffers[self._launches % IN_FLIGHT]
        self._launches += 1
        host = buffer.fill(self._inputs(batch, sources, size))
        if self.capture:
            if size not in self._graphs:
                with watched_by(None):  # a graph has no ear for it
                    self._graphs[size] = self._capture(size)
            graph, inputs, logits = self._graphs[size]
            inputs.copy_(host, non_blocking=True)
            buffer.mark()
            graph.replay()
        else:
            inputs = host.to(self._device)
            logits = self.step(inputs)
        return Flight(logits[:count], *buffer.take(self.step.last[:count]))

    def replay(self, batch: Batch) -> Callable[[], None]:
        """What runs the captured step of `batch` again, with the same inputs: for measuring it. Needs `capture`."""
        self.launch(batch).tokens()
        graph, _, _ = self._graphs[self._size(len(batch.spans))]
        return graph.replay

    def _size(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)

    def _inputs(self, batch: Batch, sources: Sequence[int] | None, size: int) -> list[list[int]]:
        spans, padding = batch.spans, size - len(batch.spans)
        cache = self.step.cache
        return [
            [*batch.ids, *[0] * padding],
            [*(sources or [-1] * len(spans)), *[-1] * padding],
            [*(span.past for span in spans), *[-1] * padding],
            [*(span.slot for span in spans), *[0] * padding],
            *([*pages, *[0] * padding] for pages in zip(*map(cache.pages_of, spans), strict=True)),
        ]

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Warm up on the stream of the capture (kernels compile, workspaces appear), then record."""
        last = self.step.last.clone()  # which the step about to be launched may need
        inputs = torch.zeros(self._rows, size, dtype=torch.int32, device=self._device)
        inputs[1:3] = -1
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step(inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads, of NCCL or of ranks that share this process, may call CUDA meanwhile.
        with (
            _no_collection(),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            logits = self.step(inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self.step.last.copy_(last)
        self._pool = self._pool or graph.pool()
        return graph, inputs, logits


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No cyclic garbage is collected inside: an older graph that ended there would end a capture too, with an error."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Buffer:
    """Pinned memory of one step: what the host tells it, and the tokens it gives back."""

    def __init__(self, rows: int, max_batch: int, cuda: bool):
        self._inputs = torch.zeros(rows * max_batch, dtype=torch.int32, pin_memory=cuda)
        self._tokens = torch.zeros(max_batch, dtype=torch.int32, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None
        self._done = torch.cuda.Event() if cuda else None

    def fill(self, rows: list[list[int]]) -> Tensor:
        """int32 [rows, B], when the step that used this buffer before has copied it."""
        if self._copied is not None:
            self._copied.synchronize()
        count, size = len(rows), len(rows[0])
        view = self._inputs[: count * size].view(count, size)
        view.copy_(torch.tensor(rows, dtype=torch.int32))
        return view

    def mark(self) -> None:
        if self._copied is not None:
            self._copied.record()

    def take(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Bring the tokens to the host; the event says when they are there."""
        mine = self._tokens[: len(tokens)]
        mine.copy_(tokens, non_blocking=True)
        if self._done is not None:
            self._done.record()
        return mine, self._done
