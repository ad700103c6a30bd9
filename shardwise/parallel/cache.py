"""The KV cache: what attention layers see of it, and its implementation with one row a sequence."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.attention.reference import torch_cached_attention_with_cache
from shardwise.parallel.batch import Batch, Span


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
    """One contiguous row of `max_length` tokens for each sequence: keys [slots, max_length, Nkv, D] a layer.

    Rows are reserved address space; the system backs them with memory as sequences grow.
    """

    def __init__(
        self, layers: list[LayerShape], *, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ):
        self.slots, self.max_length = slots, max_length
        self._layers = [_rows(shape, (slots, max_length), dtype, device) for shape in layers]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, masking: Masking) -> Tensor:
        keys, values = self._layers[layer]
        if batch.is_single_token and masking.is_plain:
            return _attend_one(q, k, v, keys, values, batch.spans[0], masking)
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

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, max_length, Nkv, D], views with equal strides where D = Dv."""
        return self._layers[layer]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self._layers for t in pair)


def _rows(shape: LayerShape, lead: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, in one allocation."""
    kv_heads, size = shape.kv_heads, shape.head_dim + shape.v_head_dim
    both = torch.empty(*lead, kv_heads * size, dtype=dtype, device=device)
    keys, values = both.split_with_sizes((kv_heads * shape.head_dim, kv_heads * shape.v_head_dim), -1)
    return keys.view(*lead, kv_heads, shape.head_dim), values.view(*lead, kv_heads, shape.v_head_dim)


def _attend_one(q, k, v, keys: Tensor, values: Tensor, span: Span, masking: Masking) -> Tensor:
    """One token of one sequence: the operator's maths in six kernels (51 µs through the operator, 13 µs here)."""
    past, kv_heads = span.past, k.shape[1]
    keys, values = keys.select(0, span.slot), values.select(0, span.slot)
    keys.narrow(0, past, 1).copy_(k)
    values.narrow(0, past, 1).copy_(v)
    start = max(0, past + 1 - masking.window) if masking.window else 0
    keys, values = keys.narrow(0, start, past + 1 - start), values.narrow(0, start, past + 1 - start)
    queries = q.view(kv_heads, -1, q.shape[2])
    scores = torch.baddbmm(queries.new_empty(()), queries, keys.permute(1, 2, 0), beta=0, alpha=masking.scale)
    return torch.bmm(scores.softmax(-1), values.transpose(0, 1)).view(1, q.shape[1], -1)
