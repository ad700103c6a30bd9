"""What a decode step must read of a rank's memory, and how fast that memory is."""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from shardwise.ops.bench.measure import device_microseconds
from shardwise.parallel.decoder import AnyLayer, Decoder
from shardwise.parallel.memory import memory_bytes
from shardwise.sharding.cost import touched_share
from shardwise.sharding.plan import Plan

COPY_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
"""Several times the caches: read once and written once."""


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one decode step of one rank reads at least."""

    dense: int
    """Weights that every token meets, as the rank holds them; an untied embedding is looked up, and left out."""
    experts: int
    """All routed experts that the rank holds."""
    touched: float
    """Share of them that the batch is expected to choose, where tokens choose independently and alike."""
    cache: int
    """Keys and values of the rank's sequences at their mean length, and their states."""

    @property
    def total(self) -> float:
        return self.dense + self.experts * self.touched + self.cache


def step_bytes(decoder: Decoder, plan: Plan, rank: int, *, batch: int, context: int, cache_itemsize: int) -> StepBytes:
    """`batch`: sequences of all ranks; `context`: tokens of each; `cache_itemsize`: bytes of a cached element
    (recurrent states are float32)."""
    experts = sum(memory_bytes(routed) for layer in decoder.layers if (routed := _routed(layer)))
    streamed = memory_bytes([decoder.first_norm, decoder.layers, decoder.head])
    sequences = -(-batch // plan.layout.attn_dp)
    cached = replace(plan, kv_itemsize=cache_itemsize).cache_bytes(rank, context, sequences)
    return StepBytes(streamed - experts, experts, touched_share(plan, batch), cached)


def _routed(layer: AnyLayer) -> object | None:
    """The routed experts of a layer, wherever they are wrapped."""
    feed_forward = getattr(layer, "feed_forward", None)
    return getattr(getattr(feed_forward, "routed", feed_forward), "experts", None)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy reads and writes on this device, the median of several."""
    size = COPY_BYTES[device.type]
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(2)
    if device.type == "cuda":
        return 2 * size / device_microseconds(lambda: target.copy_(source), calls=5, repeats=9) * 1e6
    samples = []
    for _ in range(7):
        begin = time.perf_counter()
        target.copy_(source)
        samples.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(samples)
