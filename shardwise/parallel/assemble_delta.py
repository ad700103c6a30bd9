"""Assembles this rank's gated delta mixers from a ModelSpec's blocks."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardwise.ops.fla.decode import DeltaGates, DeltaHeads
from shardwise.parallel.delta import GatedDeltaMixer
from shardwise.parallel.layers import LinearLike
from shardwise.parallel.states import StateShape
from shardwise.parallel.weights import Weights
from shardwise.sharding import spec

if TYPE_CHECKING:
    from shardwise.parallel.assemble import DecoderBuilder


def gated_delta(builder: "DecoderBuilder", block: spec.GatedDelta, layer: int) -> GatedDeltaMixer:
    weights, heads = builder.weights, delta_heads(builder.weights, block)

    def floats(role: str) -> Tensor:
        return weights.take(block, role, layer=layer, dtype=torch.float32)

    norm = weights.take(block, "norm.weight", layer=layer)
    return GatedDeltaMixer(
        layer=layer,
        heads=heads,
        in_projs=_in_projs(builder, block, layer, heads),
        conv=weights.take(block, "conv.weight", layer=layer),
        gates=DeltaGates(-floats("A_log").exp(), floats("dt_bias"), norm, block.norm_eps),
        out=builder.row_linear(block, "out_proj", layer),
    )


def _in_projs(
    builder: "DecoderBuilder", block: spec.GatedDelta, layer: int, heads: DeltaHeads
) -> tuple[LinearLike, ...]:
    """One projection; or, where what gives beta and decay does not stay quantised as the rest does, that by itself."""
    wide: tuple[str, ...] = "in_qkv", "in_z"
    small: tuple[str, ...] = "in_b", "in_a"
    first = second = both = None
    if "in_qkvz.weight" in block.roles:
        wide, small = ("in_qkvz",), ("in_ba",)
        first, second = (order.to(builder.weights.device) for order in _by_kind(heads))
        both = torch.cat([first, len(first) + second])
    packed = builder.packed_linear(block, *wide, layer=layer, order=first)
    if packed is None:
        return (builder.linear(block, *wide, *small, layer=layer, order=both),)
    return packed, builder.linear(block, *small, layer=layer, order=second)


def delta_heads(weights: Weights, block: spec.GatedDelta) -> DeltaHeads:
    keys, values = weights.units(block.k_axis), weights.units(block.v_axis)
    return DeltaHeads(keys, values, block.k_head_dim, block.v_head_dim)


def delta_state(weights: Weights, block: spec.GatedDelta) -> StateShape:
    heads = delta_heads(weights, block)
    return StateShape(heads.channels, block.conv_kernel, (heads.values, heads.key_dim, heads.value_dim))


def _by_kind(heads: DeltaHeads) -> tuple[Tensor, Tensor]:
    """Rows of projections that lie key head by key head, [q k v.. z..] of each and [b.. a..] of each, to
    [q | k | v | z] and [b | a]."""
    shared = heads.values // heads.keys
    key, value = heads.key_dim, shared * heads.value_dim
    first = torch.arange(heads.keys * 2 * (key + value)).view(heads.keys, -1)
    second = torch.arange(heads.keys * 2 * shared).view(heads.keys, -1)
    wide, small = first.split((key, key, value, value), 1), second.split(shared, 1)
    return torch.cat([part.reshape(-1) for part in wide]), torch.cat([part.reshape(-1) for part in small])
