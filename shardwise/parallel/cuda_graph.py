"""Decode steps as CUDA graphs: one captured for each padded batch size, replayed with new inputs."""

from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.batch import Batch
from shardwise.parallel.decode_step import DecodeStep

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""A batch runs in the graph of the next size; the rows in between are padding, which reads and writes no cache."""


class DecodeGraphs:
    """Captures `step` when a batch size first occurs. All ranks must run the same batches."""

    def __init__(self, step: DecodeStep, *, max_batch: int, device: torch.device):
        self.step, self.device = step, device
        self.sizes = tuple(s for s in BATCH_SIZES if s < max_batch) + (max_batch,)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: Any = None
        """Memory that all graphs share; they never run at once."""
        self._host = torch.zeros(3, max_batch, dtype=torch.int32, pin_memory=True)
        self._copied = torch.cuda.Event()

    def __call__(self, batch: Batch) -> Tensor:
        """Logits float32 [B, V] of a batch of one-token spans; valid until the next call."""
        count = len(batch.spans)
        size = next(s for s in self.sizes if s >= count)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, inputs, logits = self._graphs[size]
        self._fill(batch, size)
        inputs.copy_(self._host[:, :size], non_blocking=True)
        self._copied.record()
        graph.replay()
        return logits[:count]

    def _fill(self, batch: Batch, size: int) -> None:
        self._copied.synchronize()  # the pinned buffer is free again
        count = len(batch.spans)
        self._host[0, :count] = torch.tensor(batch.ids)
        self._host[1, :count] = torch.tensor([s.past for s in batch.spans])
        self._host[2, :count] = torch.tensor([s.slot for s in batch.spans])
        self._host[0, count:size] = 0
        self._host[1, count:size] = -1
        self._host[2, count:size] = 0

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Warm up on a side stream (kernels compile, workspaces appear), then record. Inputs: token, position, slot."""
        inputs = torch.zeros(3, size, dtype=torch.int32, device=self.device)
        inputs[1] = -1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(inputs)
        self._pool = self._pool or graph.pool()
        return graph, inputs, logits

    def _run(self, inputs: Tensor) -> Tensor:
        return self.step(inputs[0].long(), inputs[1], inputs[2].view(-1, 1))
