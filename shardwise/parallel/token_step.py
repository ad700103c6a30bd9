"""The decode step on the CPU: one token of one sequence through a decoder of plain float32 layers.

Built from an assembled `Decoder`; it shares the decoder's weights and cache and computes the same function. A token
streams hundreds of megabytes of weights, which leave little else in the core's caches, so that a tensor operation of
1 µs takes 3 to 10 here. This step makes a third of the layers' operations: norms are a factor of the product behind
them, heads are rotated by a product with a small matrix, row-parallel products end where the group adds them up, and
all activations have their place, and all views of it, before the first token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.attention import AttentionMixer
from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import Masking, SlotCache
from shardwise.parallel.decoder import Decoder, DecoderLayer
from shardwise.parallel.layers import GatedMlp, Linear, Norm, VocabEmbedding
from shardwise.parallel.rotary import RotaryAngles


class TokenStep:
    """`step(batch, cache)` -> the head's input [1, H] for a batch of one token, in rows of a `SlotCache`."""

    def __init__(self, decoder: Decoder):
        """ValueError when `reason_against(decoder)` names one."""
        reason = reason_against(decoder)
        if reason:
            raise ValueError(f"the decoder has no single-token step: {reason}")
        norms = [decoder.first_norm, *(layer.after.norm for layer in decoder.layers)]
        last = norms[-1]
        assert last is not None and isinstance(decoder.embedding, VocabEmbedding)
        self._embedding, self._last = decoder.embedding, last
        with torch.inference_mode():
            self._zero = torch.zeros(())
            self._residual = torch.empty(1, last.weight.shape[0])
            self._rotations: dict[RotaryAngles, _Rotation] = {}
            self._heads: dict[tuple, _Heads] = {}
            self._gated: dict[torch.Size, _Gated] = {}
            self._layers = [self._layer(x, before) for x, before in zip(decoder.layers, norms, strict=False) if before]
            panels, _, width = self._layers[0].out.shape  # as of each product that ends in the residual
            self._sum = decoder.layers[0].between.group.accumulator(self._residual.view(panels, 1, width))

    def __call__(self, batch: Batch, cache: SlotCache) -> Tensor:
        span = batch.spans[0]
        for rotation in self._rotations.values():
            rotation.turn_to(span.past)
        self._embed(batch.ids[0])
        residual, zero, term, add = self._residual, self._zero, self._sum.term, self._sum.add
        row, width = residual[0], residual.shape[1]
        bmm, baddbmm, silu = torch.bmm, torch.baddbmm, F.silu
        for number, (heads, qkv, out, mixer_eps, gated, gate_up, down, mlp_eps) in enumerate(self._layers):
            factor = (row.dot(row).item() / width + mixer_eps) ** -0.5
            baddbmm(zero, heads.x, qkv, beta=0, alpha=factor, out=heads.projected)
            _attend(heads, cache.tokens(number), span.slot, span.past)
            bmm(heads.result, out, out=term())
            add()
            factor = (row.dot(row).item() / width + mlp_eps) ** -0.5
            baddbmm(zero, gated.x, gate_up, beta=0, alpha=factor, out=gated.projected)
            silu(gated.gate, inplace=True).mul_(gated.up)
            bmm(gated.result, down, out=term())
            add()
        return self._last(residual)

    def _embed(self, token: int) -> None:
        term, found = self._sum.term(), self._embedding.row(token)
        if found is None:
            term.zero_()
        else:
            term.copy_(found.view(term.shape))
        self._residual.zero_()
        self._sum.add()
        if self._embedding.multiplier != 1.0:
            self._residual.mul_(self._embedding.multiplier)

    def _layer(self, layer: DecoderLayer, before: Norm) -> "_Layer":
        """The layer with its norms' weights multiplied into the products behind; the decoder's layer changes, too."""
        mixer, mlp, between = layer.mixer, layer.feed_forward, layer.between.norm
        assert isinstance(mixer, AttentionMixer) and isinstance(mlp, GatedMlp) and between is not None
        qkv, out, gate_up, down = (x.panels for x in _linears(mixer, mlp))
        for norm, panels in ((before, qkv), (between, gate_up)):
            panels.mul_(norm.weight[:, None])
            norm.weight = torch.ones_like(norm.weight)
        heads, gated = self._heads_of(mixer, qkv, out), self._gated_of(gate_up, down)
        return _Layer(heads, qkv, out, before.eps, gated, gate_up, down, between.eps)

    def _heads_of(self, mixer: AttentionMixer, qkv: Tensor, out: Tensor) -> "_Heads":
        """Layers of the same shape share their activations' place."""
        assert mixer.rotary is not None
        key = (mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.masking, mixer.rotary)
        if key not in self._heads:
            rotation = self._rotations.setdefault(mixer.rotary, _Rotation(mixer.rotary))
            self._heads[key] = _Heads.make(mixer, self._residual, qkv, out, rotation)
        return self._heads[key]

    def _gated_of(self, gate_up: Tensor, down: Tensor) -> "_Gated":
        if gate_up.shape not in self._gated:
            self._gated[gate_up.shape] = _Gated.make(self._residual, gate_up, down)
        return self._gated[gate_up.shape]


def reason_against(decoder: Decoder) -> str:
    """Why this decoder cannot take single-token steps; empty when it can."""
    if not isinstance(decoder.embedding, VocabEmbedding):
        return "the embedding stays quantised"
    for number, layer in enumerate(decoder.layers):
        mixer, mlp = layer.mixer, layer.feed_forward
        if not isinstance(mixer, AttentionMixer) or not isinstance(mlp, GatedMlp) or mlp.activation is not F.silu:
            return f"layer {number} is no softmax attention with a SiLU feed-forward"
        for linear in (mixer.qkv, mixer.out, mlp.gate_up, mlp.down):
            if type(linear) is not Linear or linear.bias is not None:
                return f"layer {number} has a bias or quantised weights"
            if linear.panels.dtype != torch.float32 or linear.panels.device.type != "cpu":
                return "weights are not float32 on the CPU"
        if mixer.q_norm is not None or not mixer.masking.is_plain or mixer.v_head_dim != mixer.head_dim:
            return f"layer {number} norms its heads, caps its scores, has sinks or two head sizes"
        if mixer.rotary is None or 2 * mixer.rotary.frequencies.numel() != mixer.head_dim:
            return f"layer {number} does not rotate whole heads"
        if not layer.between.is_plain or not layer.after.is_plain:
            return f"layer {number} norms or scales a block's result"
    return ""


class _Rotation:
    """The rotation of a head at one position, as the matrix [D, D] by which a row is multiplied."""

    def __init__(self, rotary: RotaryAngles):
        half, step = rotary.frequencies.numel(), 2 * rotary.frequencies.numel() + 1
        self.rotary = rotary
        self.matrix = torch.zeros(2 * half, 2 * half)
        self._cos = self.matrix.as_strided((2, half), (half * step, step))
        self._sin = self.matrix.as_strided((half,), (step,), half)
        self._minus_sin = self.matrix.as_strided((half,), (step,), half * 2 * half)

    def turn_to(self, position: int) -> None:
        angles = self.rotary.frequencies * position
        self._cos.copy_(angles.cos())
        sin = angles.sin_()
        self._sin.copy_(sin)
        torch.neg(sin, out=self._minus_sin)
        if self.rotary.scale != 1.0:
            self.matrix.mul_(self.rotary.scale)


class _Heads(NamedTuple):
    """Places of an attention layer's activations, and their views. D head size, G query heads of a KV head."""

    x: Tensor
    """Input of the projection: the residual, once a panel."""
    projected: Tensor
    """Output of the projection, in its panels: queries, keys, values."""
    unrotated: Tensor
    """[N + Nkv, D], the queries and keys of `projected`"""
    matrix: Tensor
    rotated: Tensor
    """[N + Nkv, D]"""
    new: Tensor
    """[2, Nkv * D]: what the token adds to the cache, rotated keys and values"""
    queries: Tensor
    """[Nkv, G, D] of `rotated`"""
    attended: Tensor
    """[Nkv, G, D]"""
    result: Tensor
    """`attended` as input of the output product, once a panel"""
    keys: int
    size: int
    masking: Masking
    zero: Tensor

    @classmethod
    def make(cls, mixer: AttentionMixer, residual: Tensor, qkv: Tensor, out: Tensor, rotation: _Rotation) -> "_Heads":
        heads, keys, size = mixer.heads, mixer.kv_heads, mixer.head_dim
        both = heads + keys
        memory = torch.empty((2 * both + keys) * size)  # rotated queries and keys, then all as projected
        projected = memory[both * size :]
        attended = torch.empty(keys, heads // keys, size)
        return cls(
            x=residual.expand(len(qkv), *residual.shape),
            projected=projected.view(len(qkv), 1, -1),
            unrotated=projected[: both * size].view(both, size),
            matrix=rotation.matrix,
            rotated=memory[: both * size].view(both, size),
            new=memory.as_strided((2, keys * size), ((both + keys) * size, 1), heads * size),
            queries=memory[: heads * size].view(keys, -1, size),
            attended=attended,
            result=attended.view(1, -1).expand(len(out), 1, -1),
            keys=keys,
            size=size,
            masking=mixer.masking,
            zero=torch.zeros(()),
        )


class _Gated(NamedTuple):
    """Places of a feed-forward's activations, and their views."""

    x: Tensor
    projected: Tensor
    gate: Tensor
    up: Tensor
    result: Tensor
    """`gate`, once a panel of the down product"""

    @classmethod
    def make(cls, residual: Tensor, gate_up: Tensor, down: Tensor) -> "_Gated":
        memory = torch.empty(2 * down.shape[1])
        gate, up = memory.chunk(2)
        return cls(
            x=residual.expand(len(gate_up), *residual.shape),
            projected=memory.view(len(gate_up), 1, -1),
            gate=gate,
            up=up,
            result=gate.expand(len(down), 1, -1),
        )


class _Layer(NamedTuple):
    """What a step needs of one layer; weights in panels."""

    heads: _Heads
    qkv: Tensor
    out: Tensor
    mixer_eps: float
    gated: _Gated
    gate_up: Tensor
    down: Tensor
    mlp_eps: float


def _linears(mixer: AttentionMixer, mlp: GatedMlp) -> list[Linear]:
    return [x for x in (mixer.qkv, mixer.out, mlp.gate_up, mlp.down) if isinstance(x, Linear)]


def _attend(heads: _Heads, cached: Tensor, slot: int, past: int) -> None:
    """From `heads.projected` to `heads.attended`; cached [slots, max_length, 2 Nkv * D] takes the token's row."""
    torch.mm(heads.unrotated, heads.matrix, out=heads.rotated)
    keys, size = heads.keys, heads.size
    per_token = 2 * keys * size
    begin = slot * cached.stride(0)
    cached.as_strided((2, keys * size), (keys * size, 1), begin + past * per_token).copy_(heads.new)
    window = heads.masking.window
    start = max(0, past + 1 - window) if window else 0
    length, begin = past + 1 - start, begin + start * per_token
    seen = cached.as_strided((keys, size, length), (size, 1, per_token), begin)
    scores = torch.baddbmm(heads.zero, heads.queries, seen, beta=0, alpha=heads.masking.scale)
    values = cached.as_strided((keys, length, size), (size, per_token, 1), begin + keys * size)
    torch.bmm(scores.softmax(-1), values, out=heads.attended)
