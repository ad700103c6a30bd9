"""The KV cache: what attention layers see of it, and its implementation with one row a sequence."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.attention.reference import torch_cached_attention_with_cache
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.single_tokens import SingleTokens
from shardwise.parallel.states import StateCache, StateShape


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
    """A layer's cache on this rank; a layer without keys and values has `kv_heads` 0."""

    kv_heads: int = 0
    head_dim: int = 0
    v_head_dim: int = 0
    window: int | None = None
    """Last tokens of a sequence that the cache must keep; None: all of them."""
    values_in_keys: bool = False
    """A head's value is the beginning of its key, and is kept once."""
    state: StateShape | None = None
    """What it keeps of a sequence beside these."""

    @property
    def width(self) -> int:
        """Elements of a token."""
        return self.kv_heads * (self.head_dim + (0 if self.values_in_keys else self.v_head_dim))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [.., width] as keys [.., Nkv, D] and values [.., Nkv, Dv], views."""
        end = self.kv_heads * self.head_dim
        keys = rows[..., :end].unflatten(-1, (self.kv_heads, self.head_dim))
        if self.values_in_keys:
            return keys, keys[..., : self.v_head_dim]
        return keys, rows[..., end:].unflatten(-1, (self.kv_heads, self.v_head_dim))


@dataclass(frozen=True)
class LatentWeights:
    """What latents of C elements become keys and values by, of each of this rank's N heads.

    key_up    W_UK [N, P, C]
    value_up  W_UV, turned, [N, C, Dv]
    """

    key_up: Tensor
    value_up: Tensor

    @property
    def heads(self) -> int:
        return self.key_up.shape[0]

    @property
    def nope(self) -> int:
        """P, elements of a head's query and key that carry no rotation."""
        return self.key_up.shape[1]

    @property
    def rank(self) -> int:
        """C."""
        return self.key_up.shape[2]


class KvCache(ABC):
    """Keys and values of past tokens. A layer appends and attends in one call and knows nothing of the storage.

    Recurrent layers find theirs in `states`, by the same slots.
    """

    max_length: int
    """Tokens that one sequence may have."""
    slots: int
    """Sequences that fit at once; a span's `slot` is below it."""
    states: StateCache

    @abstractmethod
    def attend(self, layer: int, q: Tensor, kv: Tensor, batch: Batch, masking: Masking) -> Tensor:
        """Append kv [T, width], rows as `LayerShape.split` reads them, and attend with q [T, N, D], causally.

        Returns [T, N, Dv].
        """

    def attend_latents(
        self, layer: int, q: Tensor, key: Tensor, batch: Batch, weights: LatentWeights, masking: Masking
    ) -> Tensor:
        """Append latent keys [T, C + R] and attend with q [T, N, P + R], both rotated, causally. Returns [T, N, Dv].

        Here by the absorbed weights: all heads share one key, whose latent is the value.
        """
        query = q.new_empty(*q.shape[:2], key.shape[1])
        query[..., : weights.rank] = torch.bmm(q[..., : weights.nope].transpose(0, 1), weights.key_up).transpose(0, 1)
        query[..., weights.rank :] = q[..., weights.nope :]
        attended = self.attend(layer, query, key, batch, masking)
        return torch.bmm(attended.transpose(0, 1), weights.value_up).transpose(0, 1)

    @abstractmethod
    def reserve(self, slot: int, tokens: int) -> bool:
        """Room for `tokens` tokens of the sequence in `slot`, those it has included; False: there is none left."""

    @abstractmethod
    def release(self, slot: int) -> None:
        """The sequence in `slot` is done."""

    @abstractmethod
    def nbytes(self) -> int: ...


class SlotCache(KvCache):
    """One contiguous row of `max_length` tokens for each sequence: [slots, max_length, width] a layer.

    Rows are reserved address space; the system backs them with memory as sequences grow. What follows a sequence
    in its row is zero, since what overflowed to NaN would spoil those that are padded with it: `release` clears it.
    """

    def __init__(
        self, layers: list[LayerShape], *, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ):
        self.slots, self.max_length = slots, max_length
        self._layers = [_Rows.make(shape, (slots, max_length), dtype, device) for shape in layers]
        shapes = [shape.state for shape in layers]
        self.states = StateCache(shapes, slots=slots, dtype=dtype, device=device, kernels=False)
        self._step: tuple[Batch, dict[int | None, SingleTokens]] | None = None
        self._held = [0] * slots

    def reserve(self, slot: int, tokens: int) -> bool:
        self._held[slot] = max(self._held[slot], tokens)
        return tokens <= self.max_length

    def release(self, slot: int) -> None:
        for rows in self._layers:
            rows.tokens[slot, : self._held[slot]] = 0
        self.states.clear(slot)
        self._held[slot] = 0

    def attend(self, layer: int, q: Tensor, kv: Tensor, batch: Batch, masking: Masking) -> Tensor:
        rows = self._layers[layer]
        if batch.is_single_token and masking.is_plain:
            return _attend_one(q, kv, rows, batch.spans[0], masking)
        if batch.prefills == 0 and masking.is_plain and rows.attends_at_once:
            step = self._singles(batch, masking.window)
            step.append(rows.tokens, kv)
            return step.attend(q, rows.keys, rows.values, masking.scale)
        k, v = rows.shape.split(kv)
        out = torch_cached_attention_with_cache(
            q[None],
            k[None],
            v[None],
            batch.batch_info,
            batch.seq_len,
            batch.input_pos,
            batch.slots,
            batch.cu_seqlen,
            rows.keys,
            rows.values,
            masking.scale,
            masking.sinks,
            masking.window,
            masking.softcap,
        )
        return out[0]

    def _singles(self, batch: Batch, window: int | None) -> SingleTokens:
        """Found once for all layers with this window."""
        if self._step is None or self._step[0] is not batch:
            self._step = (batch, {})
        found = self._step[1]
        if window not in found:
            found[window] = SingleTokens(batch, window)
        return found[window]

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, max_length, Nkv, D], views with equal strides where D = Dv."""
        return self._layers[layer].keys, self._layers[layer].values

    def tokens(self, layer: int) -> Tensor:
        """[slots, max_length, width], contiguous."""
        return self._layers[layer].tokens

    def nbytes(self) -> int:
        return sum(rows.tokens.nbytes for rows in self._layers) + self.states.nbytes()


@dataclass(frozen=True)
class _Rows:
    """One layer's memory, whole and as the operators see it."""

    shape: LayerShape
    tokens: Tensor
    """[slots, max_length, width]"""
    keys: Tensor
    """[slots, max_length, Nkv, D], a view"""
    values: Tensor
    """[slots, max_length, Nkv, Dv], a view"""

    @classmethod
    def make(cls, shape: LayerShape, lead: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "_Rows":
        tokens = torch.zeros(*lead, shape.width, dtype=dtype, device=device)
        return cls(shape, tokens, *shape.split(tokens))

    @property
    def attends_at_once(self) -> bool:
        """Whether torch's fused kernel takes several sequences; of two head sizes it would copy keys for each head."""
        return self.tokens.device.type == "cpu" and self.shape.head_dim == self.shape.v_head_dim


def _attend_one(q: Tensor, kv: Tensor, rows: _Rows, span: Span, masking: Masking) -> Tensor:
    """One token of one sequence: the operator's maths in five kernels (51 µs through the operator, 12 µs here)."""
    past, (_, heads, size) = span.past, q.shape
    rows.tokens.select(0, span.slot).narrow(0, past, 1).copy_(kv)
    start = max(0, past + 1 - masking.window) if masking.window else 0
    keys = rows.keys.select(0, span.slot).narrow(0, start, past + 1 - start)
    values = rows.values.select(0, span.slot).narrow(0, start, past + 1 - start)
    scores = torch.bmm(q.view(keys.shape[1], -1, size), keys.permute(1, 2, 0))
    weights = scores.mul_(masking.scale).softmax(-1)
    return torch.bmm(weights, values.transpose(0, 1)).view(1, heads, -1)
