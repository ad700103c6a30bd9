"""The decode step on the CPU: one token of one sequence through a decoder of plain float32 layers.

Built from an assembled `Decoder`; it shares the decoder's weights and cache and computes the same function. A token
streams hundreds of megabytes of weights, which leave little else in the core's caches, so that a tensor operation of
1 µs takes 5 to 10 here: this step makes half as many of them as the layers do (views are taken in one call each, the
attention scale is part of the rotation, norms are a factor of the product behind them), and no Python calls between.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.attention import AttentionMixer
from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import SlotCache
from shardwise.parallel.decoder import Decoder, DecoderLayer
from shardwise.parallel.layers import GatedMlp, Linear, Norm
from shardwise.parallel.rotary import RotaryAngles


@dataclass(frozen=True)
class _Heads:
    """Head counts and sizes of a layer, and the strides of one token's row of its projection and of its cache."""

    queries: int
    keys: int
    size: int
    scale: float
    window: int | None
    rotary: RotaryAngles

    @property
    def cached(self) -> int:
        """Elements of a token's row in the cache: keys, then values."""
        return 2 * self.keys * self.size


class TokenStep:
    """`step(batch, cache)` -> the head's input [1, H] for a batch of one token, in rows of a `SlotCache`."""

    def __init__(self, decoder: Decoder):
        """ValueError when `reason_against(decoder)` names one."""
        reason = reason_against(decoder)
        if reason:
            raise ValueError(f"the decoder has no single-token step: {reason}")
        self._embedding = decoder.embedding
        group = decoder.layers[0].between.group
        self._all_reduce = group.all_reduce if group.size > 1 else None
        norms = [decoder.first_norm, *(layer.after.norm for layer in decoder.layers)]
        with torch.inference_mode():
            self._layers = [_folded(x, before) for x, before in zip(decoder.layers, norms, strict=False) if before]
        last = norms[-1]
        assert last is not None
        self._last = last
        self._zero = torch.zeros(())

    def __call__(self, batch: Batch, cache: SlotCache) -> Tensor:
        span = batch.spans[0]
        angles = {layer.heads: _angles(layer.heads, batch) for layer in self._layers}
        residual = self._embedding(batch.tokens)
        row, width = residual[0], residual.shape[1]
        all_reduce, zero, mm, addmm = self._all_reduce, self._zero, torch.mm, torch.addmm
        for number, (heads, qkv, out, gate_up, down, mixer_eps, mlp_eps) in enumerate(self._layers):
            cos, sin = angles[heads]
            factor = (float(row.dot(row)) / width + mixer_eps) ** -0.5
            projected = addmm(zero, residual, qkv, beta=0, alpha=factor)
            part = mm(_attend(projected, heads, cos, sin, cache.tokens(number), span.slot, span.past), out)
            if all_reduce is not None:
                all_reduce(part, out=part)
            residual.add_(part)
            factor = (float(row.dot(row)) / width + mlp_eps) ** -0.5
            gate, up = addmm(zero, residual, gate_up, beta=0, alpha=factor).chunk(2, 1)
            part = mm(F.silu(gate).mul_(up), down)
            if all_reduce is not None:
                all_reduce(part, out=part)
            residual.add_(part)
        return self._last(residual)


def reason_against(decoder: Decoder) -> str:
    """Why this decoder cannot take single-token steps; empty when it can."""
    for number, layer in enumerate(decoder.layers):
        mixer, mlp = layer.mixer, layer.feed_forward
        if not isinstance(mixer, AttentionMixer) or not isinstance(mlp, GatedMlp) or mlp.activation is not F.silu:
            return f"layer {number} is no softmax attention with a SiLU feed-forward"
        for linear in (mixer.qkv, mixer.out, mlp.gate_up, mlp.down):
            if type(linear) is not Linear or linear.bias is not None:
                return f"layer {number} has a bias or quantised weights"
            if linear.weight.dtype != torch.float32 or linear.weight.device.type != "cpu":
                return "weights are not float32 on the CPU"
        if mixer.q_norm is not None or not mixer.masking.is_plain or mixer.v_head_dim != mixer.head_dim:
            return f"layer {number} norms its heads, caps its scores, has sinks or two head sizes"
        if mixer.rotary is None or 2 * mixer.rotary.frequencies.numel() != mixer.head_dim:
            return f"layer {number} does not rotate whole heads"
        if not layer.between.is_plain or not layer.after.is_plain:
            return f"layer {number} norms or scales a block's result"
    return ""


class _Layer(NamedTuple):
    """What a step needs of one layer."""

    heads: _Heads
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    mixer_eps: float
    mlp_eps: float


def _folded(layer: DecoderLayer, before: Norm) -> _Layer:
    """The layer with its norms' weights multiplied into the products behind them; the decoder's layer changes, too."""
    mixer, mlp, between = layer.mixer, layer.feed_forward, layer.between.norm
    assert isinstance(mixer, AttentionMixer) and isinstance(mlp, GatedMlp)
    assert mixer.rotary is not None and between is not None
    linears = [linear.weight for linear in (mixer.qkv, mixer.out, mlp.gate_up, mlp.down) if isinstance(linear, Linear)]
    qkv, out, gate_up, down = linears
    for norm, weight in ((before, qkv), (between, gate_up)):
        weight.mul_(norm.weight[:, None])
        norm.weight = torch.ones_like(norm.weight)
    masking = mixer.masking
    heads = _Heads(mixer.heads, mixer.kv_heads, mixer.head_dim, masking.scale, masking.window, mixer.rotary)
    return _Layer(heads, qkv, out, gate_up, down, before.eps, between.eps)


def _angles(heads: _Heads, batch: Batch) -> tuple[Tensor, Tensor]:
    """cos and sin [N + Nkv, D] of the token's position; those of the queries carry the attention scale."""
    scales = torch.ones(heads.queries + heads.keys, 1)
    scales[: heads.queries] = heads.scale
    cos, sin = batch.rotation(heads.rotary)
    return cos[0] * scales, sin[0] * scales


def _attend(qkv: Tensor, heads: _Heads, cos: Tensor, sin: Tensor, cached: Tensor, slot: int, past: int) -> Tensor:
    """qkv [1, (N + 2 Nkv) * D], rotated in place; cached [slots, max_length, 2 Nkv * D] -> [1, N * D]."""
    queries, keys, size = heads.queries, heads.keys, heads.size
    per_token = heads.cached
    qk = qkv.as_strided((queries + keys, size), (size, 1))
    swapped = qk.roll(size // 2, 1)
    qk.mul_(cos).addcmul_(swapped, sin)
    begin = slot * cached.stride(0)
    new = qkv.as_strided((per_token,), (1,), queries * size)
    cached.as_strided((per_token,), (1,), begin + past * per_token).copy_(new)
    start = max(0, past + 1 - heads.window) if heads.window else 0
    length, begin = past + 1 - start, begin + start * per_token
    grouped = qkv.as_strided((keys, queries // keys, size), (queries // keys * size, size, 1))
    scores = torch.bmm(grouped, cached.as_strided((keys, size, length), (size, 1, per_token), begin))
    values = cached.as_strided((keys, length, size), (size, per_token, 1), begin + keys * size)
    return torch.bmm(scores.softmax(-1), values).view(1, queries * size)
