"""Assembles this rank's attention mixers from a ModelSpec's blocks."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardwise.parallel.attention import AttentionMixer
from shardwise.parallel.cache import LatentWeights, LayerShape, Masking
from shardwise.parallel.factors import Factors
from shardwise.parallel.head_norms import HeadNorms, JointNorms
from shardwise.parallel.layers import Norm
from shardwise.parallel.mla import LatentMixer
from shardwise.parallel.weights import Weights
from shardwise.sharding import spec
from shardwise.sharding.axes import LogicalAxis

if TYPE_CHECKING:
    from shardwise.parallel.assemble import DecoderBuilder


def attention(builder: "DecoderBuilder", block: spec.Attention, layer: int) -> AttentionMixer:
    weights, head_dim, v_head_dim = builder.weights, block.head_dim, block.v_head_dim
    heads, kv_heads = weights.units(block.q_axis), weights.units(block.kv_axis)
    rope, order, head = block.rope, None, torch.arange(head_dim, device=weights.device)
    if rope is not None and rope.interleaved:
        rope, head = replace(rope, interleaved=False), _halves_of_pairs(head, rope.dim)
        order = _rows(head, heads + kv_heads, kv_heads * v_head_dim)
    gated, fused = block.output_gate == "per_element", "qkv.weight" in block.roles
    if gated:
        order = _gated_rows(head, heads, kv_heads, kv_heads * v_head_dim)
    after_keys = kv_heads * v_head_dim + (heads * head_dim if gated else 0)
    factors = Factors.of(
        (heads * head_dim, 1.0),
        (kv_heads * head_dim, block.key_multiplier),
        (after_keys, 1.0),
        inputs=block.in_multiplier,
    )
    projected = ("qkv",) if fused else ("q", "k", "v")
    return AttentionMixer(
        layer=layer,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        qkv=builder.linear(block, *projected, layer=layer, order=order, factors=factors),
        out=builder.row_linear(block, "o", layer, block.out_multiplier),
        masking=Masking(
            scale=block.scale,
            window=block.window,
            softcap=block.softcap,
            sinks=weights.find(block, "sinks", layer=layer),
        ),
        rotary=builder.rotary(rope),
        qk_norms=_qk_norms(builder, block, layer, head),
        norm_after_rotation=block.qk_norm_after_rope,
        gated=gated,
    )


def _qk_norms(
    builder: "DecoderBuilder", block: spec.Attention, layer: int, head: Tensor
) -> HeadNorms | JointNorms | None:
    """`head`: the order of a head's elements."""
    if block.qk_norm is None:
        return None
    weights = builder.weights
    q, k = (
        weights.take(block, f"{role}.weight", layer=layer).unflatten(0, (-1, len(head)))[:, head]
        for role in ("q_norm", "k_norm")
    )
    if block.qk_norm == "head":
        eps, offset = block.norm_eps, block.norm_weight_offset
        return HeadNorms(q=Norm(weight=q[0], eps=eps, offset=offset), k=Norm(weight=k[0], eps=eps, offset=offset))
    return JointNorms(
        q=q + block.norm_weight_offset,
        k=k + block.norm_weight_offset,
        eps=block.norm_eps,
        heads=(block.heads, block.kv_heads),
        copies=_copies(weights, block.kv_axis),
        group=builder.groups.tp,
    )


def _copies(weights: Weights, axis: LogicalAxis) -> Tensor:
    """[units of this rank]: tensor-parallel ranks that hold each of its units."""
    layout, cut = weights.plan.layout, weights.plan.cuts.by_axis[axis]
    held = [cut.share(rank).ranges for rank in range(layout.tp)]
    counts = torch.tensor([sum(a <= unit < b for ranges in held for a, b in ranges) for unit in range(axis.units)])
    mine = held[layout.coordinates(weights.rank).tp]
    return torch.cat([counts[a:b] for a, b in mine]).to(weights.device)


def latent_attention(builder: "DecoderBuilder", block: spec.MlaAttention, layer: int) -> LatentMixer:
    weights, rope, latent = builder.weights, block.rope, block.kv_rank
    assert rope is not None
    turned = torch.arange(rope.dim, device=weights.device)
    if rope.interleaved:
        rope, turned = replace(rope, interleaved=False), _halves_of_pairs(turned, rope.dim)
    rotary = builder.rotary(rope)
    assert rotary is not None

    def behind(count: int) -> Tensor:
        """A head's elements, the rotated ones behind `count` others."""
        return torch.cat((torch.arange(count, device=weights.device), count + turned))

    heads = weights.units(block.q_axis)
    queries = _rows(behind(block.nope_dim), heads, 0)
    q_norm = q_up = None
    if block.q_rank is not None:
        q_norm = Norm(weight=weights.take(block, "q_a_norm.weight", layer=layer), eps=block.norm_eps)
        q_up = builder.linear(block, "q_b", layer=layer, order=queries)
        queries = torch.arange(block.q_rank, device=weights.device)
    down = ("q" if q_up is None else "q_a", "kv_a")
    projected = weights.linear(block, "kv_b", layer=layer).unflatten(0, (heads, -1))
    key_up, value_up = projected.split_with_sizes((block.nope_dim, block.v_head_dim), 1)
    return LatentMixer(
        layer=layer,
        down=builder.linear(block, *down, layer=layer, order=torch.cat((queries, len(queries) + behind(latent)))),
        q_norm=q_norm,
        q_up=q_up,
        kv_norm=Norm(weight=weights.take(block, "kv_a_norm.weight", layer=layer), eps=block.norm_eps),
        weights=LatentWeights(key_up.contiguous(), value_up.transpose(1, 2).contiguous()),
        out=builder.row_linear(block, "o", layer),
        masking=Masking(scale=block.scale),
        rotary=rotary,
    )


def _halves_of_pairs(head: Tensor, dim: int) -> Tensor:
    """A head's elements, the pairs of neighbours among the first `dim` laid half of these apart, as `rotate` has pairs.

    Scores do not depend on the order, as long as queries and keys have the same one.
    """
    return torch.cat((head[0:dim:2], head[1:dim:2], head[dim:]))


def _rows(head: Tensor, heads: int, values: int) -> Tensor:
    """Rows of a projection to [queries and keys | values], every query and key head in the order `head`."""
    size = len(head)
    turned = torch.arange(heads, device=head.device)[:, None] * size + head
    return torch.cat((turned.view(-1), torch.arange(heads * size, heads * size + values, device=head.device)))


def _gated_rows(head: Tensor, heads: int, kv_heads: int, values: int) -> Tensor:
    """Rows of a projection where each query head stands before its gates, to [queries | keys | values | gates]."""
    size = len(head)
    starts = 2 * size * torch.arange(heads, device=head.device)[:, None]
    gates = starts + size + torch.arange(size, device=head.device)
    others = 2 * size * heads + _rows(head, kv_heads, values)
    return torch.cat(((starts + head).view(-1), others, gates.view(-1)))


def cache_shape(weights: Weights, mixer: spec.Block) -> LayerShape:
    """What a mixer caches on this rank."""
    if isinstance(mixer, spec.MlaAttention):
        return LayerShape(1, mixer.kv_rank + mixer.rope_dim, mixer.kv_rank, values_in_keys=True)
    assert isinstance(mixer, spec.Attention)
    return LayerShape(weights.units(mixer.kv_axis), mixer.head_dim, mixer.v_head_dim, mixer.window)
