"""Runs an engine's steps by the code that is fastest for them, and says which that is and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shardwise.parallel import decode_step, token_step
from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache, SlotCache
from shardwise.parallel.cuda_graph import DecodeGraphs
from shardwise.parallel.decode_step import DecodeStep
from shardwise.parallel.decoder import Decoder
from shardwise.parallel.device_cache import DeviceCache
from shardwise.parallel.options import KERNEL_PATHS, require_decode
from shardwise.parallel.paged import PagedCache
from shardwise.parallel.sampler import sample
from shardwise.parallel.scheduler import Request, Step
from shardwise.parallel.token_step import TokenStep


class Launched(Protocol):
    """A step whose tokens are under way."""

    def tokens(self) -> list[int]:
        """Of each sampled request, when they are there."""


@dataclass(frozen=True)
class Known:
    """Tokens that are on the host already."""

    values: list[int]

    def tokens(self) -> list[int]:
        return self.values


class Runner:
    """Steps of one decoder.

    path  "graphs": steps of single tokens run fused, as CUDA graphs (`decode_step.py`); "fused": the same kernels,
          launched one by one; "layers": the decoder's layers; "auto": graphs on a GPU, where the decoder allows it
    """

    def __init__(self, decoder: Decoder, device: torch.device, path: str = "auto"):
        require_decode(path, device.type)
        self._decoder, self._device = decoder, device
        self._on_gpu = device.type == "cuda" or path in KERNEL_PATHS
        self._reason, self._why = self._choose(path), ""
        self.token_step: TokenStep | None = None
        if not self._on_gpu and path == "auto":
            self._why = token_step.reason_against(decoder)
            self.token_step = None if self._why else TokenStep(decoder)
        self.graphs: DecodeGraphs | None = None
        self._cache: KvCache | None = None
        self._path = path

    def _choose(self, path: str) -> str:
        """Why single-token steps do not run fused; empty when they do. ValueError when that was asked for by name."""
        if path == "layers":
            return "asked for by name"
        if not self._on_gpu:
            return "the device is a CPU"
        reason = decode_step.reason_against(self._decoder)
        if reason and path != "auto":
            raise ValueError(f"decode path {path} cannot serve this model: {reason}; use auto")
        return reason

    @property
    def needs_device_cache(self) -> bool:
        """Whether the cache must be one that kernels of a GPU read."""
        return self._on_gpu

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the tokens of the one before are known."""
        return not self._reason

    def describe(self) -> str:
        """Which code runs the steps that decode, and why."""
        if not self._reason:
            if self._path == "fused":
                return "fused step, kernel by kernel: asked for by name"
            sizes = self.graphs.captured if self.graphs else ()
            return f"fused step in CUDA graphs (batch sizes captured: {', '.join(map(str, sizes)) or 'none yet'})"
        if self._on_gpu or self._path == "layers":
            return f"layer by layer: {self._reason}"
        why = self._why or ("the cache has pages" if isinstance(self._cache, PagedCache) else "")
        return f"layer by layer: {why}" if why else "single-token step for one sequence, else layer by layer"

    def use(self, cache: KvCache | None) -> None:
        """Run on this cache from now on; None: let the last one go."""
        if cache is self._cache:
            return
        self._cache, self.graphs = cache, None
        if cache is not None and self.runs_ahead:
            assert isinstance(cache, DeviceCache)
            step = DecodeStep(self._decoder, cache, max_batch=cache.slots)
            self.graphs = DecodeGraphs(step, max_batch=cache.slots, capture=self._path != "fused")

    def launch(self, step: Step) -> Launched:
        """Start a step; where it cannot run ahead, or its requests do not all choose greedily, finish it."""
        greedy = all(request.params.temperature == 0 for request in step.sampled)
        whole = len(step.sampled) == len(step.batch.spans)  # a prompt's chunk may be a single token too
        if self.graphs is not None and not step.batch.spans:  # a group without work, which others need not here
            return Known([])
        if self.graphs is not None and step.batch.prefills == 0 and whole:
            flight = self.graphs.launch(step.batch, step.sources)
            return flight if greedy else Known(self._sampled(self._decoder.head.finish(flight.logits), step.sampled))
        hidden = self._hidden(step.batch)
        if not step.sampled:  # a chunk of a prompt
            return Known([])
        if greedy:
            return Known(self._decoder.head.best(hidden))
        return Known(self._sampled(self._decoder.head(hidden), step.sampled))

    def _hidden(self, batch: Batch) -> Tensor:
        cache = self._cache
        assert cache is not None
        if self.token_step is not None and batch.is_single_token and isinstance(cache, SlotCache):
            return self.token_step(batch, cache)
        return self._decoder.hidden(batch, cache)

    def _sampled(self, logits: Tensor, requests: Sequence[Request]) -> list[int]:
        return [sample(row, request.params, request.generator) for row, request in zip(logits, requests, strict=True)]
