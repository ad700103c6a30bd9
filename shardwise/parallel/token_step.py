"""The decode step on the CPU: one token of one sequence through a decoder of plain float32 layers.

Built from an assembled `Decoder`; it shares the decoder's weights and cache and computes the same function. A token
streams hundreds of megabytes of weights, which leave little else in the core's caches, so that a tensor operation of
1 µs takes 5 to 10 here: this step makes half as many of them as the layers do (views are taken in one call each, the
attention scale is part of the rotation), and no Python calls between them.
"""

from dataclasses import dataclass

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
        self._embedding, self._first = decoder.embedding, decoder.first_norm
        group = decoder.layers[0].between.group
        self._all_reduce = group.all_reduce if group.size > 1 else None
        self._layers = [_weights(layer) for layer in decoder.layers]
        self._zero = torch.zeros(())

    def __call__(self, batch: Batch, cache: SlotCache) -> Tensor:
        span = batch.spans[0]
        angles = {heads: _angles(heads, batch) for heads, *_ in self._layers}
        residual = self._embedding(batch.tokens)
        x = self._first(residual)
        row, width = residual[0], residual.shape[1]
        all_reduce, zero, mm, addcmul = self._all_reduce, self._zero, torch.mm, torch.addcmul
        for number, (heads, qkv, out, between, gate_up, down, after) in enumerate(self._layers):
            cos, sin = angles[heads]
            part = mm(_attend(mm(x, qkv), heads, cos, sin, cache.tokens(number), span.slot, span.past), out)
            if all_reduce is not None:
                all_reduce(part, out=part)
            residual.add_(part)
            factor = (float(row.dot(row)) / width + between.eps) ** -0.5
            x = addcmul(zero, residual, between.weight, value=factor)
            gate, up = mm(x, gate_up).chunk(2, 1)
            part = mm(F.silu(gate).mul_(up), down)
            if all_reduce is not None:
                all_reduce(part, out=part)
            residual.add_(part)
            factor = (float(row.dot(row)) / width + after.eps) ** -0.5
            x = addcmul(zero, residual, after.weight, value=factor)
        return x


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


def _weights(layer: DecoderLayer) -> tuple[_Heads, Tensor, Tensor, Norm, Tensor, Tensor, Norm]:
    mixer, mlp, norms = layer.mixer, layer.feed_forward, (layer.between.norm, layer.after.norm)
    assert isinstance(mixer, AttentionMixer) and isinstance(mlp, GatedMlp) and mixer.rotary is not None
    linears = [linear.weight for linear in (mixer.qkv, mixer.out, mlp.gate_up, mlp.down) if isinstance(linear, Linear)]
    qkv, out, gate_up, down = linears
    assert norms[0] is not None and norms[1] is not None
    masking = mixer.masking
    heads = _Heads(mixer.heads, mixer.kv_heads, mixer.head_dim, masking.scale, masking.window, mixer.rotary)
    return heads, qkv, out, norms[0], gate_up, down, norms[1]


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
