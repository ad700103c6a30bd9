"""The KV cache: what attention layers see of it, and its implementation with one row a sequence."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.attention.reference import torch_cached_attention_with_cache
from shardwise.parallel.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What the scores of one layer go through: scale, window (positions seen, itself included), cap, sinks [N]."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True)
class LayerShape:
    """A layer's cache on this rank; a layer without one has `kv_heads` 0."""

    kv_heads: int
    head_dim: int
    v_head_dim: int


class KvCache(ABC):
    """Keys and values of past tokens. A layer appends and attends in one call and knows nothing of the storage."""

    max_length: int
    """Tokens that one sequence may have."""
    slots: int
    """Sequences that fit at once; a span's `slot` is below it."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, masking: Masking) -> Tensor:
        """Append k [T, Nkv, D], v [T, Nkv, Dv] and attend with q [T, N, D], causally. Returns [T, N, Dv]."""

    @abstractmethod
    def nbytes(self) -> int: ...


class SlotCache(KvCache):
    """One contiguous row of `max_length` tokens for each sequence: [slots, max_length, Nkv, D] a layer.

    Rows are reserved address space; the system backs them with memory as sequences grow.
    """

    def __init__(
        self, layers: list[LayerShape], *, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ):
        self.slots, self.max_length = slots, max_length
        self._keys, self._values = [], []
        for shape in layers:
            size = (slots, max_length, shape.kv_heads)
            self._keys.append(torch.empty(*size, shape.head_dim, dtype=dtype, device=device))
            self._values.append(torch.empty(*size, shape.v_head_dim, dtype=dtype, device=device))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, masking: Masking) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        if batch.is_single_token and masking.is_plain:
            return _attend_one(q, k, v, keys, values, batch, masking)
        out = torch_cached_attention_with_cache(
            q[None],
            k[None],
            v[None],
            batch.batch_info,
            batch.seq_len,
            batch.input_pos,
            batch.slots,
            batch.cu_seqlen,
            keys,
            values,
            masking.scale,
            masking.sinks,
            masking.window,
            masking.softcap,
        )
        return out[0]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._keys + self._values)


def _attend_one(q, k, v, keys, values, batch: Batch, masking: Masking) -> Tensor:
    """One token of one sequence: the operator's maths in six calls (51 µs through the operator, 13 µs here)."""
    span = batch.spans[0]
    end = span.past + 1
    keys, values = keys[span.slot], values[span.slot]
    keys[span.past].copy_(k[0])
    values[span.past].copy_(v[0])
    start = max(0, end - masking.window) if masking.window else 0
    kv_heads, size = keys.shape[1:]
    scores = torch.bmm(q.view(kv_heads, -1, size), keys[start:end].permute(1, 2, 0))
    weights = scores.mul_(masking.scale).softmax(-1)
    return torch.bmm(weights, values[start:end].transpose(0, 1)).view(1, q.shape[1], -1)
