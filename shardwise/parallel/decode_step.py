"""The decode step on a GPU: one token of each sequence through the decoder in few kernels, fit for a CUDA graph.

Built from an assembled `Decoder`; it shares the decoder's weights and cache and computes the same function. A layer is
norm + QKV product, attention (rotation, append, scores, combine), output product + residual, norm + gate/up product +
activation, down product + residual: five kernels on one rank. Over several ranks the sums between them are the group's
fused all-reduce + residual + norm. Batches above `SKINNY_ROWS` use the library's matrix products.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.attention.decode import DecodeWorkspace, fused_decode_attention, splits_for
from shardwise.ops.linear.decode import skinny_linear
from shardwise.parallel.attention import AttentionMixer
from shardwise.parallel.cache import SlotCache
from shardwise.parallel.decoder import Decoder, DecoderLayer
from shardwise.parallel.layers import GatedMlp, Linear, LinearLike, Norm, ResidualNorm
from shardwise.parallel.rotary import RotaryAngles

SKINNY_ROWS = 2
"""Most tokens for which reading the weights once a token in matrix-vector products beats a matrix product."""


@dataclass(frozen=True)
class Stream:
    """The activations between two blocks: `x`, still to be normed by `norm` if there is one, and the residual."""

    x: Tensor
    residual: Tensor
    norm: Norm | None = None


def reason_against(decoder: Decoder, cache: SlotCache) -> str:
    """Why this decoder cannot take the fused step; empty when it can."""
    for number, layer in enumerate(decoder.layers):
        mixer = layer.mixer
        if not isinstance(mixer, AttentionMixer):
            return f"layer {number} is no softmax attention"
        size = mixer.head_dim
        if mixer.v_head_dim != size or size & (size - 1) or not 32 <= size <= 256:
            return f"layer {number}: head sizes {size} and {mixer.v_head_dim}, need one power of two from 32 to 256"
        if mixer.masking.softcap is not None:
            return f"layer {number}: capped scores"
        if mixer.rotary is not None and 2 * mixer.rotary.frequencies.numel() != size:
            return f"layer {number}: rotation of part of the head"
    if cache.max_length % 64:
        return f"cache rows of {cache.max_length} tokens, need a multiple of 64"
    return ""


class DecodeStep:
    """`step(tokens, positions, slots)` -> logits, for up to `max_batch` sequences.

    pdl: kernels start while the one before drains (programmatic dependent launch), on GPUs that have it.
    """

    def __init__(self, decoder: Decoder, cache: SlotCache, *, max_batch: int, pdl: bool = False):
        reason = reason_against(decoder, cache)
        if reason:
            raise ValueError(f"no fused decode step: {reason}")
        self.decoder, self.cache, self.pdl = decoder, cache, pdl
        device = cache.rows(0)[0].device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._workspaces: dict[tuple[int, int, int], list[DecodeWorkspace]] = {}
        self._rope: dict[RotaryAngles | None, Tensor] = {}
        for layer in decoder.layers:
            self._prepare(_attention(layer), max_batch, processors, device)

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """tokens int64 [B]; positions int32 [B], negative for padding rows; slots int32 [B, 1] -> float32 [B, V]."""
        x = self.decoder.embedding(tokens)
        stream = Stream(x, x, self.decoder.first_norm)
        for number, layer in enumerate(self.decoder.layers):
            stream = self._layer(layer, number, stream, positions, slots)
        head = self.decoder.head
        return head.finish(self._product(head.linear, stream))

    def _layer(self, layer: DecoderLayer, number: int, stream: Stream, positions: Tensor, slots: Tensor) -> Stream:
        mixer = _attention(layer)
        qkv = self._product(mixer.qkv, stream)
        attended = fused_decode_attention(
            qkv,
            *self.cache.rows(number),
            slots,
            positions,
            self._rope[mixer.rotary],
            self._workspace(mixer, qkv.shape[0]),
            heads=mixer.heads,
            scale=mixer.masking.scale,
            q_norm=mixer.q_norm.weight if mixer.q_norm else None,
            k_norm=mixer.k_norm.weight if mixer.k_norm else None,
            eps=mixer.q_norm.eps if mixer.q_norm else 0.0,
            sinks=mixer.masking.sinks,
            window=mixer.masking.window,
            pdl=self.pdl,
        )
        stream = self._join(mixer.out, attended, stream.residual, layer.between)
        inner = layer.feed_forward
        if isinstance(inner, GatedMlp) and self._is_skinny(stream.x) and _is_silu(inner):
            hidden = self._skinny(inner.gate_up, stream, gated=True)
            return self._join(inner.down, hidden, stream.residual, layer.after)
        return Stream(*layer.after(inner(self._normed(stream)), stream.residual))

    def _product(self, linear: LinearLike, stream: Stream) -> Tensor:
        if self._is_skinny(stream.x):
            return self._skinny(linear, stream)
        return linear(self._normed(stream))

    def _join(self, linear: LinearLike, x: Tensor, residual: Tensor, join: ResidualNorm) -> Stream:
        """The row-parallel product, its sum over the group, the residual, and the norm now or with the next product."""
        if not self._is_skinny(x):
            return Stream(*join(linear(x), residual))
        if join.group.size == 1 and join.post is None and join.multiplier == 1.0:
            summed = skinny_linear(x, _weight(linear), bias=linear.bias, residual=residual, pdl=self.pdl)
            return Stream(summed, summed, join.norm)
        return Stream(*join(skinny_linear(x, _weight(linear), bias=linear.bias, pdl=self.pdl), residual))

    def _skinny(self, linear: LinearLike, stream: Stream, gated: bool = False) -> Tensor:
        norm = stream.norm
        return skinny_linear(
            stream.x,
            _weight(linear),
            norm_weight=norm.weight if norm else None,
            eps=norm.eps if norm else 0.0,
            bias=linear.bias,
            gated=gated,
            pdl=self.pdl,
        )

    def _normed(self, stream: Stream) -> Tensor:
        return stream.norm(stream.x) if stream.norm else stream.x

    def _is_skinny(self, x: Tensor) -> bool:
        return x.shape[0] <= SKINNY_ROWS

    def _prepare(self, mixer: AttentionMixer, max_batch: int, processors: int, device: torch.device) -> None:
        """Angles of all positions, and one workspace for each number of splits that a batch size asks for."""
        if mixer.rotary not in self._rope:
            self._rope[mixer.rotary] = _angles(mixer.rotary, self.cache.max_length, mixer.head_dim, device)
        key = (mixer.heads, mixer.kv_heads, mixer.head_dim)
        if key not in self._workspaces:
            most = min(self.cache.max_length, mixer.masking.window or self.cache.max_length)
            splits = splits_for(1, mixer.kv_heads, most, processors)
            self._workspaces[key] = [
                DecodeWorkspace.create(max_batch, *key, s, device) for s in sorted({1, 2, 4, 8, splits})
            ]

    def _workspace(self, mixer: AttentionMixer, batch: int) -> DecodeWorkspace:
        """The one with the most splits that still gives each processor no more than a few programs."""
        spaces = self._workspaces[(mixer.heads, mixer.kv_heads, mixer.head_dim)]
        allowed = max(1, spaces[-1].splits // batch)
        return next(s for s in reversed(spaces) if s.splits <= allowed or s.splits == 1)


def _attention(layer: DecoderLayer) -> AttentionMixer:
    assert isinstance(layer.mixer, AttentionMixer)  # else `reason_against` had one
    return layer.mixer


def _is_silu(mlp: GatedMlp) -> bool:
    return mlp.activation is F.silu and mlp.gate_up.bias is None


def _angles(rotary: RotaryAngles | None, length: int, size: int, device: torch.device) -> Tensor:
    """float32 [length, size]: cos of the first half, then sin; without rotation ones, then zeros."""
    if rotary is None:
        half = torch.ones(length, size // 2, device=device)
        return torch.cat((half, torch.zeros_like(half)), -1)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rotary.frequencies.to(device)
    return torch.cat((angles.cos(), angles.sin()), -1) * rotary.scale


def _weight(linear: LinearLike) -> Tensor:
    """[out, in]; weights that stay quantised are the CPU's."""
    assert isinstance(linear, Linear)
    return linear.weight.t()
