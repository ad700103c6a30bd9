"""The decode step on the CPU: one token of one sequence through a decoder of plain layers, activations in float32.

Built from an assembled `Decoder`; it shares the decoder's weights and cache and computes the same function, with
weights in float32 or in 4-bit blocks (`token_products.py`). A token streams tens or hundreds of megabytes of weights,
which leave little else in the core's caches, so that a tensor operation of 1 µs takes 3 to 10 here. This step makes a
third of the layers' operations: norms are a factor of the product that follows, heads are rotated by a product with a
small matrix, row-parallel products end where the group adds them up, and all activations have their place, and all
views of it, before the first token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.attention import AttentionMixer
from shardwise.parallel.batch import Batch
from shardwise.parallel.block_linear import BlockEmbedding, BlockLinear
from shardwise.parallel.cache import Masking, SlotCache
from shardwise.parallel.decoder import Decoder, DecoderLayer
from shardwise.parallel.layers import GatedMlp, Linear, LinearLike, Norm, VocabEmbedding
from shardwise.parallel.rotary import RotaryAngles
from shardwise.parallel.token_products import Product, product, product_shape


class TokenStep:
    """`step(batch, cache)` -> the head's input [1, H] for a batch of one token, in rows of a `SlotCache`."""

    def __init__(self, decoder: Decoder):
        """ValueError when `reason_against(decoder)` names one."""
        reason = reason_against(decoder)
        if reason:
            raise ValueError(f"the decoder has no single-token step: {reason}")
        norms = [decoder.first_norm, *(layer.after.norm for layer in decoder.layers)]
        last = norms[-1]
        assert last is not None and isinstance(decoder.embedding, VocabEmbedding | BlockEmbedding)
        self._embedding, self._last = decoder.embedding, last
        with torch.inference_mode():
            self._zero = torch.zeros(())
            self._residual = torch.empty(1, last.weight.shape[0])
            self._rotations: dict[RotaryAngles, _Rotation] = {}
            self._heads: dict[tuple, _Heads] = {}
            self._gated: dict[int, _Gated] = {}
            pairs = zip(decoder.layers, norms, strict=False)
            self._layers = [self._layer(x, norm) for x, norm in pairs if norm and isinstance(x, DecoderLayer)]
            first = decoder.layers[0]
            assert isinstance(first, DecoderLayer) and isinstance(first.mixer, AttentionMixer)
            total = self._residual.view(product_shape(first.mixer.out))  # as each product that ends in the residual
            self._sum = first.between.group.accumulator(total)

    def __call__(self, batch: Batch, cache: SlotCache) -> Tensor:
        span = batch.spans[0]
        for rotation in self._rotations.values():
            rotation.turn_to(span.past)
        self._embed(batch.ids[0])
        residual, term, add, silu = self._residual, self._sum.term, self._sum.add, F.silu
        row, width = residual[0], residual.shape[1]
        for number, (heads, qkv, out, mixer_eps, gated, gate_up, down, mlp_eps) in enumerate(self._layers):
            qkv((row.dot(row).item() / width + mixer_eps) ** -0.5, heads.projected)
            _attend(heads, cache.tokens(number), span.slot, span.past)
            out(1.0, term())
            add()
            gate_up((row.dot(row).item() / width + mlp_eps) ** -0.5, gated.projected)
            silu(gated.gate, inplace=True).mul_(gated.up)
            down(1.0, term())
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
        mixer, mlp, between, x = layer.mixer, layer.feed_forward, layer.between.norm, self._residual
        assert isinstance(mixer, AttentionMixer) and isinstance(mlp, GatedMlp) and between is not None
        heads, gated = self._heads_of(mixer), self._gated_of(mlp)
        return _Layer(
            heads=heads,
            qkv=product(mixer.qkv, x, before),
            out=product(mixer.out, heads.attended.view(1, -1)),
            mixer_eps=before.eps,
            gated=gated,
            gate_up=product(mlp.gate_up, x, between),
            down=product(mlp.down, gated.gate),
            mlp_eps=between.eps,
        )

    def _heads_of(self, mixer: AttentionMixer) -> "_Heads":
        """Layers of the same shape share their activations' place."""
        assert mixer.rotary is not None
        key = (mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.masking, mixer.rotary)
        if key not in self._heads:
            rotation = self._rotations.setdefault(mixer.rotary, _Rotation(mixer.rotary))
            self._heads[key] = _Heads.make(mixer, rotation)
        return self._heads[key]

    def _gated_of(self, mlp: GatedMlp) -> "_Gated":
        width = mlp.gate_up.out_features
        if width not in self._gated:
            self._gated[width] = _Gated.make(mlp)
        return self._gated[width]


def reason_against(decoder: Decoder) -> str:
    """Why this decoder cannot take single-token steps; empty when it can."""
    if not isinstance(decoder.embedding, VocabEmbedding | BlockEmbedding):
        return "it has no embedding of a vocabulary"
    kinds = set()
    for number, layer in enumerate(decoder.layers):
        if not isinstance(layer, DecoderLayer):
            return f"layer {number} has one block, or its blocks in parallel"
        mixer, mlp = layer.mixer, layer.feed_forward
        if not isinstance(mixer, AttentionMixer) or not isinstance(mlp, GatedMlp) or mlp.activation is not F.silu:
            return f"layer {number} is not softmax attention with a SiLU feed-forward"
        linears = (mixer.qkv, mixer.out, mlp.gate_up, mlp.down)
        kinds |= {type(linear) for linear in linears}
        if kinds not in ({Linear}, {BlockLinear}):
            return f"up to layer {number} weights are of kinds {', '.join(sorted(kind.__name__ for kind in kinds))}"
        if any(linear.bias is not None for linear in linears) or not all(map(_is_usable, linears)):
            return f"layer {number} has a bias, 8-bit blocks, or weights that are not float32 on the CPU"
        if mixer.qk_norms or mixer.gated or not mixer.masking.is_plain or mixer.v_head_dim != mixer.head_dim:
            return f"layer {number} norms its heads, caps its scores, has sinks, a gated output or two head sizes"
        if mixer.rotary is None or 2 * mixer.rotary.frequencies.numel() != mixer.head_dim:
            return f"layer {number} does not rotate whole heads"
        if not layer.between.is_plain or not layer.after.is_plain:
            return f"layer {number} norms or scales a block's result"
    norm = decoder.first_norm
    if type(norm) is not Norm or norm.weight.dtype != torch.float32 or norm.weight.device.type != "cpu":
        return "activations are not float32 on the CPU, or enter the first layer without an RMS norm"
    return ""


def _is_usable(linear: LinearLike) -> bool:
    if isinstance(linear, Linear):
        return linear.panels.dtype == torch.float32 and linear.panels.device.type == "cpu"
    return isinstance(linear, BlockLinear) and len(linear.planes) == 1


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

    projected: Tensor
    """Queries, keys, values in the projection's shape"""
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
    keys: int
    size: int
    masking: Masking
    zero: Tensor

    @classmethod
    def make(cls, mixer: AttentionMixer, rotation: _Rotation) -> "_Heads":
        heads, keys, size = mixer.heads, mixer.kv_heads, mixer.head_dim
        both = heads + keys
        memory = torch.empty((2 * both + keys) * size)  # rotated queries and keys, then all as projected
        projected = memory[both * size :]
        return cls(
            projected=projected.view(product_shape(mixer.qkv)),
            unrotated=projected[: both * size].view(both, size),
            matrix=rotation.matrix,
            rotated=memory[: both * size].view(both, size),
            new=memory.as_strided((2, keys * size), ((both + keys) * size, 1), heads * size),
            queries=memory[: heads * size].view(keys, -1, size),
            attended=torch.empty(keys, heads // keys, size),
            keys=keys,
            size=size,
            masking=mixer.masking,
            zero=torch.zeros(()),
        )


class _Gated(NamedTuple):
    """Places of a feed-forward's activations, and their views."""

    projected: Tensor
    """Gate and up in the projection's shape"""
    gate: Tensor
    """[1, I]"""
    up: Tensor

    @classmethod
    def make(cls, mlp: GatedMlp) -> "_Gated":
        memory = torch.empty(1, mlp.gate_up.out_features)
        gate, up = memory.chunk(2, 1)
        return cls(memory.view(product_shape(mlp.gate_up)), gate, up)


class _Layer(NamedTuple):
    """What a step needs of one layer."""

    heads: _Heads
    qkv: Product
    out: Product
    mixer_eps: float
    gated: _Gated
    gate_up: Product
    down: Product
    mlp_eps: float


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
