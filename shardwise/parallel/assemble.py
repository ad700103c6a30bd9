"""Assembles this rank's decoder from a ModelSpec's blocks.

A new family is data (a spec); it needs code here only where it has a block with new maths, which is then one entry in
`MIXERS` or `FEED_FORWARDS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwise.comm.rank import Groups
from shardwise.parallel.assemble_attention import attention, cache_shape, latent_attention
from shardwise.parallel.assemble_delta import delta_state, gated_delta
from shardwise.parallel.assemble_mamba import mamba, mamba_state
from shardwise.parallel.block_groups import grouped_planes
from shardwise.parallel.block_linear import Affine, BlockEmbedding, BlockHead, BlockLinear, planes_of
from shardwise.parallel.cache import LayerShape
from shardwise.parallel.decoder import (
    AnyLayer,
    Decoder,
    DecoderLayer,
    FeedForwardLayer,
    JointMixers,
    MixerLayer,
    ParallelLayer,
)
from shardwise.parallel.factors import Factors
from shardwise.parallel.float8_linear import Float8Linear
from shardwise.parallel.int4_linear import Int4Linear
from shardwise.parallel.layers import (
    GatedMlp,
    LayerNorm,
    Linear,
    LinearLike,
    Norm,
    PlainMlp,
    ResidualNorm,
    VocabEmbedding,
    VocabHead,
    activation_named,
)
from shardwise.parallel.load_experts import load_experts
from shardwise.parallel.load_float8 import float8_weight
from shardwise.parallel.load_int4 import int4_weights
from shardwise.parallel.moe import DataParallelMoe, MoeBlock, MoeWithShared, SharedExpert
from shardwise.parallel.rotary import RotaryAngles
from shardwise.parallel.states import StateShape
from shardwise.parallel.supported import check_supported
from shardwise.parallel.weights import Weights
from shardwise.parallel.wide_buffer import WideBuffer
from shardwise.sharding import spec
from shardwise.sharding.model import Layer


class DecoderBuilder:
    """Turns the plan's model into this rank's layers. UnsupportedModel names the block that has no implementation."""

    def __init__(self, weights: Weights, groups: Groups):
        self.weights, self.groups = weights, groups
        self.model = weights.plan.model
        self._rotary: dict[spec.Rope, RotaryAngles] = {}
        self.wide = WideBuffer(weights.dtype, weights.device)

    def build(self) -> Decoder:
        model = self.model
        check_supported(model)
        embedding, head = self._ends()
        norms = [self._entry_norm(layer, i) for i, layer in enumerate(model.layers)]
        norms.append(self._norm(model.final_norm, "final_norm", None))
        layers = [self._layer(layer, i, norms[i + 1]) for i, layer in enumerate(model.layers)]
        decoder = Decoder(embedding=embedding, first_norm=norms[0], layers=layers, head=self._head(head))
        self.weights.require_all_taken()
        self.wide.allocate()
        return decoder

    def cache_shapes(self) -> list[LayerShape]:
        """What every layer caches on this rank."""
        return [self._cache_shape(layer.mixers) for layer in self.model.layers]

    def _cache_shape(self, mixers: Sequence[spec.Block]) -> LayerShape:
        shape = LayerShape()
        for mixer in mixers:
            if type(mixer) in STATES:
                shape = replace(shape, state=STATES[type(mixer)](self.weights, mixer))
            else:
                shape = replace(cache_shape(self.weights, mixer), state=shape.state)
        return shape

    def _entry_norm(self, layer: Layer, number: int) -> Norm | None:
        if layer.mixers:
            return self._norm(layer.mixer_norm, "mixer_norm", number)
        return self._norm(layer.feed_forward_norm, "feed_forward_norm", number)

    def _layer(self, layer: Layer, number: int, next_norm: Norm | None) -> AnyLayer:
        def joining(norm: Norm | None, post: spec.Norm | None, role: str) -> ResidualNorm:
            return ResidualNorm(
                norm=norm,
                group=self.groups.tp,
                post=self._norm(post, role, number),
                multiplier=layer.residual_multiplier,
            )

        mixer, feed_forward = self._made(layer.mixers, number), self._made(layer.feed_forward, number)
        if mixer is not None and feed_forward is None:
            return MixerLayer(mixer=mixer, after=joining(next_norm, layer.mixer_post_norm, "mixer_post_norm"))
        after = joining(next_norm, layer.feed_forward_post_norm, "feed_forward_post_norm")
        if mixer is None:
            return FeedForwardLayer(feed_forward=feed_forward, after=after)
        if layer.parallel_residual:
            return ParallelLayer(mixer=mixer, feed_forward=feed_forward, after=after)
        norm = self._norm(layer.feed_forward_norm, "feed_forward_norm", number)
        between = joining(norm, layer.mixer_post_norm, "mixer_post_norm")
        return DecoderLayer(mixer=mixer, between=between, feed_forward=feed_forward, after=after)

    def _made(self, blocks: Sequence[spec.Block], number: int) -> Any:
        """A layer's mixer or feed-forward; None where it has none."""
        made = [(MIXERS | FEED_FORWARDS)[type(block)](self, block, number) for block in blocks]
        return JointMixers(made) if len(made) > 1 else made[0] if made else None

    def _norm(self, norm: spec.Norm | None, role: str, layer: int | None) -> Norm | None:
        if norm is None:
            return None
        weight = self.weights.take(norm, f"{role}.weight", layer=layer)
        if norm.kind == "rms":
            return Norm(weight=weight, eps=norm.eps, offset=norm.weight_offset)
        bias = self.weights.find(norm, f"{role}.bias", layer=layer)
        return LayerNorm(weight=weight, eps=norm.eps, offset=norm.weight_offset, bias=bias)

    def _ends(self) -> tuple[VocabEmbedding | BlockEmbedding, LinearLike]:
        """Embedding and the head's product; they share the table where they are tied."""
        model, group = self.model, self.groups.tp
        rows = self.weights.shard(model.embedding.roles["embed.weight"]).ranges[0]
        vocab, multiplier = rows[0] if rows else (0, 0), model.embedding.multiplier
        eight_bit = model.head.tied and model.embedding.roles["embed.weight"].dtype == "Q8_0"
        stored = self.weights.blocks(model.embedding, "embed") if eight_bit else None
        if stored:
            table = BlockEmbedding(
                blocks=stored[1], vocab=vocab, group=group, dtype=self.weights.dtype, multiplier=multiplier
            )
            return table, BlockHead(blocks=stored[1], table=table)
        weight = self.weights.take(model.embedding, "embed.weight")
        if model.head.tied:
            tied = Linear(weight=weight)
            return VocabEmbedding(table=tied, vocab=vocab, group=group, multiplier=multiplier), tied
        embedding = VocabEmbedding(table=weight, vocab=vocab, group=group, multiplier=multiplier)
        return embedding, self.linear(model.head, "head")

    def _head(self, linear: LinearLike) -> VocabHead:
        head, tp = self.model.head, self.weights.plan.layout.tp
        block, role = (self.model.embedding, "embed") if head.tied else (head, "head")
        return VocabHead(
            linear=linear,
            sizes=tuple(self.weights.linear_shape(block, role, rank)[0] for rank in range(tp)),
            group=self.groups.tp,
            vocab=self.model.vocab,
            softcap=head.softcap,
            multiplier=head.multiplier,
        )

    def linear(
        self,
        block: spec.Block,
        *roles: str,
        layer: int | None = None,
        order: Tensor | None = None,
        factors: Factors | None = None,
    ) -> LinearLike:
        """Column-parallel: the roles' outputs concatenated, or in `order`, multiplied by `factors`."""
        bias = self._bias(block, roles, layer)
        if order is not None and bias is not None:
            bias = bias[order]
        if factors is None:
            packed = self.packed_linear(block, *roles, layer=layer, order=order, bias=bias)
            if packed is not None:
                return packed
        weight = self.weights.linear(block, *roles, layer=layer)
        if order is not None:
            weight = weight[order]
        if factors is not None:
            factors.scale(weight, bias)
        return Linear(weight=weight, bias=bias)

    def packed_linear(
        self, block: spec.Block, *roles: str, layer: int | None, order: Tensor | None = None, bias: Tensor | None = None
    ) -> LinearLike | None:
        """With weights that stay codes or float8, in `order` as `bias` is already; else None."""
        planes = self._planes(block, *roles, layer=layer)
        if planes:
            if order is not None:
                planes = [(codes[order], scales[order], zeros[order]) for codes, scales, zeros in planes]
            return BlockLinear(planes=planes, bias=bias)
        codes = int4_weights(self.weights, block, *roles, layer=layer, order=order)
        if codes is not None:
            self.wide.reserve(codes)
            return Int4Linear(weight=codes, bias=bias, widened=self.wide.widened)
        weight = float8_weight(self.weights, block, *roles, layer=layer, order=order)
        if weight is None:
            return None
        self.wide.reserve(weight)
        return Float8Linear(weight=weight, bias=bias, widened=self.wide.widened)

    def _planes(self, block: spec.Block, *roles: str, layer: int | None) -> list[Affine] | None:
        """Weights that stay 4- and 8-bit codes; None where they do not."""
        stored = self.weights.blocks(block, *roles, layer=layer)
        return planes_of(*stored) if stored else grouped_planes(self.weights, block, *roles, layer=layer)

    def _bias(self, block: spec.Block, roles: Sequence[str], layer: int | None) -> Tensor | None:
        """The roles' biases, zero where a role has none; None where none has."""
        found = {role: self.weights.find(block, f"{role}.bias", layer=layer) for role in roles}
        some = next((bias for bias in found.values() if bias is not None), None)
        if some is None:
            return None
        rows = {role: self.weights.linear_shape(block, role)[0] for role in roles}
        return torch.cat([some.new_zeros(rows[role]) if bias is None else bias for role, bias in found.items()])

    def row_linear(self, block: spec.Block, role: str, layer: int, factor: float = 1.0) -> LinearLike:
        """Row-parallel: its bias is added by one rank."""
        linear = self.linear(block, role, layer=layer, factors=Factors.of((self.model.hidden, factor)))
        if self.groups.tp.rank > 0:
            linear.bias = None
        return linear

    def rotary(self, rope: spec.Rope | None) -> RotaryAngles | None:
        """Layers with equal rotation share one object, so that a step computes its angles once."""
        if rope is not None and rope not in self._rotary:
            self._rotary[rope] = RotaryAngles(
                rope, max_positions=self.model.max_positions, dtype=self.weights.dtype, device=self.weights.device
            )
        return None if rope is None else self._rotary[rope]


def dense_mlp(builder: DecoderBuilder, block: spec.DenseMlp, layer: int, prefix: str = "") -> GatedMlp | PlainMlp:
    """`prefix`: what the roles of a shared expert begin with."""
    activation = activation_named(block.activation)
    down = builder.row_linear(block, f"{prefix}down", layer, block.down_multiplier)
    if not block.gated:
        return PlainMlp(up=builder.linear(block, f"{prefix}up", layer=layer), down=down, activation=activation)
    roles = ("gate_up",) if f"{prefix}gate_up.weight" in block.roles else ("gate", "up")
    width = builder.weights.units(block.mlp_axis)
    factors = Factors.of((width, block.gate_multiplier), (width, 1.0))
    gate_up = builder.linear(block, *(prefix + role for role in roles), layer=layer, factors=factors)
    return GatedMlp(gate_up=gate_up, down=down, activation=activation)


def moe(builder: DecoderBuilder, block: spec.Moe, layer: int) -> MoeBlock | MoeWithShared | DataParallelMoe:
    weights, plan, groups = builder.weights, builder.weights.plan, builder.groups
    local = plan.experts(weights.rank, block.expert_axis)
    slots = torch.full((block.expert_axis.units,), -1, dtype=torch.int64)
    slots[list(local)] = torch.arange(len(local))
    routed = MoeBlock(
        router=builder.linear(block, "router", layer=layer),
        routing=block.routing,
        slots=slots.to(weights.device),
        first=local[0] if list(local) == list(range(local[0], local[0] + len(local))) else None,
        experts=load_experts(weights, block, layer, local, adds_bias=groups.moe_tp.rank == 0, wide=builder.wide),
        correction=weights.find(block, "router.correction", layer=layer, dtype=torch.float32),
        latent=_latent(builder, block, layer) if block.latent else None,
    )
    shared = _shared_expert(builder, block, layer)
    if groups.attn_dp.size > 1:
        holders = torch.empty_like(slots)
        for rank, held in enumerate(plan.cuts.placement[block.expert_axis]):
            holders[list(held)] = rank
        return DataParallelMoe(routed=routed, groups=groups, holders=holders.to(weights.device), shared=shared)
    return routed if shared is None else MoeWithShared(routed=routed, shared=shared)


def _latent(builder: DecoderBuilder, block: spec.Moe, layer: int) -> tuple[LinearLike, LinearLike]:
    """Products into the experts' width, and out of it, which each rank does with its partial sum: without biases."""
    return builder.linear(block, "latent_down", layer=layer), builder.linear(block, "latent_up", layer=layer)


def _shared_expert(builder: DecoderBuilder, block: spec.Moe, layer: int) -> SharedExpert | None:
    if block.shared is None:
        return None
    gated = "shared_gate.weight" in block.roles
    return SharedExpert(
        mlp=dense_mlp(builder, block.shared, layer, "shared."),
        gate=builder.linear(block, "shared_gate", layer=layer) if gated else None,
    )


MIXERS: dict[type, Callable] = {
    spec.Attention: attention,
    spec.MlaAttention: latent_attention,
    spec.Mamba2: mamba,
    spec.GatedDelta: gated_delta,
}
STATES: dict[type, Callable[..., StateShape]] = {spec.Mamba2: mamba_state, spec.GatedDelta: delta_state}
"""Mixers that keep states instead of keys and values."""
FEED_FORWARDS: dict[type, Callable] = {spec.DenseMlp: dense_mlp, spec.Moe: moe}
