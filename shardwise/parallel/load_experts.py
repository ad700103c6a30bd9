"""Loads this rank's experts, whatever way a checkpoint stores them, into the one form that `Experts` computes with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise.ops.moe.mxfp4_layout import pack_mxfp4
from shardwise.parallel.float8_linear import Float8Experts
from shardwise.parallel.int4_linear import Int4Experts
from shardwise.parallel.layers import activation_named
from shardwise.parallel.load_float8 import float8_experts
from shardwise.parallel.load_int4 import int4_stacks
from shardwise.parallel.moe import AnyExperts, Experts, ExpertUnit, PackedExperts
from shardwise.parallel.weight_form import stays_packed
from shardwise.parallel.weights import Weights, is_quantised
from shardwise.parallel.wide_buffer import WideBuffer
from shardwise.sharding import spec


def load_experts(
    weights: Weights, block: spec.Moe, layer: int, local: Sequence[int], *, adds_bias: bool, wide: WideBuffer
) -> AnyExperts:
    """`local`: expert numbers in slot order. `adds_bias`: this rank adds the second bias, which each rank has whole.
    `wide`: where experts in 4 bits become plain ones."""
    unit = ExpertUnit(
        activation=activation_named(block.activation),
        gated=block.gated,
        alpha=block.alpha or 1.0,
        limit=block.limit,
    )
    if weights.packs_mxfp4 and stays_packed(block):
        return _packed(weights, block, layer, unit, adds_bias)
    float8 = float8_experts(weights, block, layer, local) if unit.is_silu else None
    if float8 is not None:
        return Float8Experts(up_gate=float8[0], down=float8[1])
    int4 = int4_stacks(weights, block, layer, local)
    if int4 is not None:
        wide.reserve(*int4)
        experts = block.expert_axis.units
        return Int4Experts(up_gate=int4[0], down=int4[1], experts=experts, widened=wide.all_widened)
    stacked = _stacked(weights, block, layer) if block.stacked else _separate(weights, block, layer, local)
    up_gate, down, up_gate_bias, down_bias = stacked
    return Experts(
        up_gate=up_gate,
        down=down,
        unit=unit,
        up_gate_bias=up_gate_bias,
        down_bias=down_bias if adds_bias else None,
    )


def _packed(weights: Weights, block: spec.Moe, layer: int, unit: ExpertUnit, adds_bias: bool) -> PackedExperts:
    """Blocks and scales as stored, re-laid out at once; the plan cuts both at whole blocks."""

    def matrix(role: str, paired: bool, biased: bool):
        blocks = weights.take(block, f"{role}.weight", layer=layer)
        scales = weights.take(block, f"{role}.scale", layer=layer)
        bias = weights.find(block, f"{role}.bias", layer=layer)
        if bias is None or not biased:
            bias = torch.zeros(blocks.shape[:2], device=blocks.device)
        return pack_mxfp4(blocks, scales, bias, paired)

    return PackedExperts(up_gate=matrix("gate_up", True, True), down=matrix("down", False, adds_bias), unit=unit)


def _separate(weights: Weights, block: spec.Moe, layer: int, local: Sequence[int]) -> tuple:
    """One tensor an expert. Filled one by one, so that no second copy of all experts exists."""
    width, hidden = weights.linear_shape(block, "up")
    rows = 2 * width if block.gated else width
    up_gate = torch.empty(len(local), rows, hidden, dtype=weights.dtype, device=weights.device)
    down = torch.empty(len(local), hidden, width, dtype=weights.dtype, device=weights.device)
    for slot, expert in enumerate(local):
        up_gate[slot, :width] = weights.linear(block, "up", layer=layer, expert=expert)
        if block.gated:
            up_gate[slot, width:] = weights.linear(block, "gate", layer=layer, expert=expert)
        down[slot] = weights.linear(block, "down", layer=layer, expert=expert)
    return up_gate, down, None, None


def _stacked(weights: Weights, block: spec.Moe, layer: int) -> tuple:
    """3-D tensors, gate and up in one; quantised ones always have [E, out, in]."""
    up_gate, down = (weights.linear(block, role, layer=layer) for role in ("gate_up", "down"))
    if block.transposed and not is_quantised(block, "gate_up"):
        up_gate, down = (stored.transpose(1, 2).contiguous() for stored in (up_gate, down))
    gate_up_bias = weights.find(block, "gate_up.bias", layer=layer)
    return (
        _up_before_gate(up_gate, block.gate_up_interleaved),
        down,
        None if gate_up_bias is None else _up_before_gate(gate_up_bias, block.gate_up_interleaved),
        weights.find(block, "down.bias", layer=layer),
    )


def _up_before_gate(both: Tensor, interleaved: bool) -> Tensor:
    """[E, 2I, ...] with gate rows first, or gate and up rows in turn -> up rows first. In place: no second copy."""
    for expert in both:
        gate, up = (expert[0::2], expert[1::2]) if interleaved else expert.chunk(2)
        expert.copy_(torch.cat((up, gate)))
    return both
