"""Assembles this rank's gated delta mixers from a ModelSpec's blocks."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardwise.ops.fla.decode import DeltaGates, DeltaHeads
from shardwise.parallel.delta import GatedDeltaMixer
from shardwise.parallel.states import StateShape
from shardwise.parallel.weights import Weights
from shardwise.sharding import spec

if TYPE_CHECKING:
    from shardwise.parallel.assemble import DecoderBuilder


def gated_delta(builder: "DecoderBuilder", block: spec.GatedDelta, layer: int) -> GatedDeltaMixer:
    weights, heads = builder.weights, delta_heads(builder.weights, block)
    if "in_qkvz.weight" in block.roles:
        in_proj = builder.linear(block, "in_qkvz", "in_ba", layer=layer, order=_by_kind(heads).to(weights.device))
    else:
        in_proj = builder.linear(block, "in_qkv", "in_z", "in_b", "in_a", layer=layer)

    def floats(role: str) -> Tensor:
        return weights.take(block, role, layer=layer, dtype=torch.float32)

    norm = weights.take(block, "norm.weight", layer=layer)
    return GatedDeltaMixer(
        layer=layer,
        heads=heads,
        in_proj=in_proj,
        conv=weights.take(block, "conv.weight", layer=layer),
        gates=DeltaGates(-floats("A_log").exp(), floats("dt_bias"), norm, block.norm_eps),
        out=builder.row_linear(block, "out_proj", layer),
    )


def delta_heads(weights: Weights, block: spec.GatedDelta) -> DeltaHeads:
    keys, values = weights.units(block.k_axis), weights.units(block.v_axis)
    return DeltaHeads(keys, values, block.k_head_dim, block.v_head_dim)


def delta_state(weights: Weights, block: spec.GatedDelta) -> StateShape:
    heads = delta_heads(weights, block)
    return StateShape(heads.channels, block.conv_kernel, (heads.values, heads.key_dim, heads.value_dim))


def _by_kind(heads: DeltaHeads) -> Tensor:
    """Rows of a projection that lies key head by key head, [q k v.. z..] of each and then [b.. a..] of each, to
    [q | k | v | z | b | a]."""
    shared = heads.values // heads.keys
    key, value = heads.key_dim, shared * heads.value_dim
    first = torch.arange(heads.keys * 2 * (key + value)).view(heads.keys, -1)
    second = first.numel() + torch.arange(heads.keys * 2 * shared).view(heads.keys, -1)
    parts = (*first.split((key, key, value, value), 1), *second.split(shared, 1))
    return torch.cat([part.reshape(-1) for part in parts])
