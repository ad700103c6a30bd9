"""Assembles this rank's Mamba-2 mixers from a ModelSpec's blocks, and says what states they keep."""

from typing import TYPE_CHECKING

import torch

from shardwise.parallel.factors import Factors
from shardwise.parallel.mamba import GatedNorm, MambaMixer, silu_gate
from shardwise.parallel.states import StateShape
from shardwise.parallel.weights import Weights
from shardwise.sharding import spec

if TYPE_CHECKING:
    from shardwise.parallel.assemble import DecoderBuilder


def mamba(builder: "DecoderBuilder", block: spec.Mamba2, layer: int) -> MambaMixer:
    weights = builder.weights
    heads, groups = weights.units(block.head_axis), weights.units(block.group_axis)
    inner, shared = heads * block.head_dim, groups * block.state
    segments = block.segment_multipliers or (1.0,) * 5
    A_log, D, dt_bias = (
        weights.take(block, role, layer=layer, dtype=torch.float32) for role in ("A_log", "D", "dt_bias")
    )
    return MambaMixer(
        layer=layer,
        heads=heads,
        groups=groups,
        head_dim=block.head_dim,
        state=block.state,
        in_proj=builder.linear(
            block,
            "in_proj",
            layer=layer,
            factors=Factors.of(
                *zip((inner, inner, shared, shared, heads), segments, strict=True), inputs=block.in_multiplier
            ),
        ),
        conv=weights.take(block, "conv.weight", layer=layer),
        conv_bias=weights.find(block, "conv.bias", layer=layer),
        A=-A_log.exp(),
        D=D,
        dt_bias=dt_bias,
        dt_limits=block.dt_limits,
        chunk=block.chunk,
        norm=_gated_norm(builder, block, layer) if block.gated_norm else silu_gate,
        out=builder.row_linear(block, "out_proj", layer, block.out_multiplier),
    )


def _gated_norm(builder: "DecoderBuilder", block: spec.Mamba2, layer: int) -> GatedNorm:
    """A norm over groups that ranks share, where there are more ranks than groups; each then has a part of one."""
    weights, plan, group = builder.weights, builder.weights.plan, builder.groups.tp
    heads = block.head_axis.units // block.norm_groups
    share = plan.cuts.share(block.head_axis, plan.layout.coordinates(weights.rank))
    return GatedNorm(
        weight=weights.take(block, "norm.weight", layer=layer),
        eps=block.norm_eps,
        size=heads * block.head_dim,
        after=block.norm_before_gate,
        group=group if block.norm_groups < group.size else None,
        groups=block.norm_groups,
        number=share.ranges[0][0] // heads,
    )


def mamba_state(weights: Weights, block: spec.Mamba2) -> StateShape:
    heads, groups = weights.units(block.head_axis), weights.units(block.group_axis)
    channels = heads * block.head_dim + 2 * groups * block.state
    return StateShape(channels, block.conv_kernel, (heads, block.head_dim, block.state))
