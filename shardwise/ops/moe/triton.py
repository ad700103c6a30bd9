"""Mixture of experts as Triton kernels: MXFP4 with its routing inside (gpt-oss), bf16 and fp8 with given routing."""

import torch
from torch import Tensor

from shardwise.ops.devices import require_one_device
from shardwise.ops.kernel_launch import Kept
from shardwise.ops.moe.contract import (
    RELU2,
    SILU,
    FP8Scales,
    activation,
    check_contiguous,
    check_fp8,
    check_same_dtype,
    check_stacked,
    first_scale,
    like_x,
)
from shardwise.ops.moe.exchange import run_routed
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.moe.mxfp4 import mxfp4_moe
from shardwise.ops.moe.mxfp4_layout import PackedOnce, packed_once
from shardwise.ops.moe.reference import check_mxfp4_moe
from shardwise.ops.recorded import recorded
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import interpreting
from shardwise.partition import extent

_READ: PackedOnce[tuple[Kept, tuple[str, str]]] = PackedOnce()


def _packed(*args) -> tuple[Kept, tuple[str, str]]:
    """What the kernels of the two operators below read of the weights among their arguments, and the forms of these,
    which follow from their scales."""
    blocks, bias, scales, _, _, down_blocks, down_bias, down_scales = args[4:12]

    def made() -> tuple[Kept, tuple[str, str]]:
        up = packed_once(blocks, scales, bias, paired=True)
        down = packed_once(down_blocks, down_scales, down_bias, paired=False)
        read = up.words, up.scales, up.bias, down.words, down.scales, down.bias
        return Kept(read), (up.format, down.format)

    return _READ.get((blocks, scales, bias, down_blocks, down_scales, down_bias), "", made)


@operator(fake=like_x, needs=(TRITON,), instead="torch_moe_dense_mlp")
@recorded(beside=_packed)
def triton_mxfp4_moe(
    hidden_states: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    top_k: int,
    gate_up_blocks: Tensor,
    gate_up_bias: Tensor,
    gate_up_scales: Tensor,
    alpha: float,
    limit: float,
    down_blocks: Tensor,
    down_bias: Tensor,
    down_scales: Tensor,
) -> Tensor:
    """gpt-oss mixture of experts, routing included, with MXFP4 weights as its checkpoints store them.

    hidden_states    [T, H] or [B, S, H]
    router_weight    [E, H], router_bias [E]: the top_k largest logits, softmax over these
    gate_up_blocks   uint8 [E, 2I, H/32, 16], rows gate (even) and up (odd); gate_up_scales uint8 [E, 2I, H/32],
                     gate_up_bias [E, 2I]
    down_blocks      uint8 [E, H, I/32, 16], down_scales uint8 [E, H, I/32], down_bias [E, H]
    alpha, limit     activation (up + 1) * gate * sigmoid(alpha * gate), gate <= limit, -limit <= up <= limit
    Returns hidden_states' shape and dtype. Products are bfloat16 with float32 sums, biases float32.

    The weights are re-laid out at the first call and kept as long as the block tensors live; call
    `prepare_mxfp4` at load to choose the moment. TypeError and ValueError name the argument that does not fit.
    """
    return triton_mxfp4_moe_ep(
        hidden_states, router_weight, router_bias, top_k, gate_up_blocks, gate_up_bias, gate_up_scales, alpha, limit,
        down_blocks, down_bias, down_scales, 1, 0,
    )  # fmt: skip


@operator(fake=like_x, needs=(TRITON,), instead="torch_moe_dense_mlp")
@recorded(beside=_packed)
def triton_mxfp4_moe_ep(
    hidden_states: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    top_k: int,
    gate_up_blocks: Tensor,
    gate_up_bias: Tensor,
    gate_up_scales: Tensor,
    alpha: float,
    limit: float,
    down_blocks: Tensor,
    down_bias: Tensor,
    down_scales: Tensor,
    ep_size: int,
    ep_rank: int,
) -> Tensor:
    """`triton_mxfp4_moe` for the experts of one rank: its partial sum, to be all-reduced by the caller.

    The router is whole (E experts); expert tensors hold `partition.extent(E, ep_size, ep_rank)` only. A token none
    of whose experts is local gives exact zero.
    """
    name = "triton_mxfp4_moe" if ep_size == 1 else "triton_mxfp4_moe_ep"
    check_mxfp4_moe(
        name, hidden_states, router_weight, router_bias, top_k, gate_up_blocks, gate_up_bias, gate_up_scales,
        down_blocks, down_bias, down_scales, ep_size, ep_rank,
    )  # fmt: skip
    check_contiguous(name, gate_up_blocks=gate_up_blocks, down_blocks=down_blocks)
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
    if not interpreting():
        tokens = tokens.to(torch.bfloat16)
    up = packed_once(gate_up_blocks, gate_up_scales, gate_up_bias, paired=True)
    down = packed_once(down_blocks, down_scales, down_bias, paired=False)
    first, _ = extent(router_weight.shape[0], ep_size, ep_rank)
    out = mxfp4_moe(tokens, router_weight, router_bias, top_k, up, down, alpha, limit, first)
    return out.to(hidden_states.dtype).view(hidden_states.shape)


def prepare_mxfp4(
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
) -> None:
    """Re-lay out the weights of one layer now, for later calls of the operators with the same tensors.

    The packed copy takes the size of the originals (padded to multiples of 64) and is given back when other weights are
    packed after these are gone.

    A later write to the weights is found by PyTorch's count of writes, which leaves out those through `tensor.data` and
    those to tensors made in inference mode: assign such new weights to `data`, or bring other tensors. A CUDA graph
    reads the packed copy that was there at its capture.
    """
    packed_once(gate_up_blocks, gate_up_scales, gate_up_bias, paired=True)
    packed_once(down_blocks, down_scales, down_bias, paired=False)


@operator(fake=like_x, needs=(TRITON,), instead="torch_moe")
@recorded()
def triton_moe_fused(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    w1_stacked_weight: Tensor,
    w2_stacked_weight: Tensor,
    is_gated_mlp: bool = False,
    act_fn: int = 8,
    mapping_config: str = "",
    max_num_tokens: int = 0,
    apply_routing_on_input: bool = False,
) -> Tensor:
    """Mixture of experts with stacked weights on grouped GEMMs, in x's dtype (bf16, fp16).

    x [T, H] or [B, S, H]; selected_experts int [T, K], ids outside [0, E) are skipped; routing_weights [T, K].
    Not gated with Relu2 (8): w1_stacked_weight [E, I, H]. Gated with Silu (4) or Swiglu (5): [E, 2I, H], I rows of
    w3 (up), then I rows of w1 (gate). w2_stacked_weight [E, H, I]. Sums in float32, in a fixed order.
    mapping_config, max_num_tokens, apply_routing_on_input as in `torch_moe`.
    """
    name = "triton_moe_fused"
    act = activation(name, is_gated_mlp, act_fn)
    experts, _ = check_stacked(name, x, w1_stacked_weight, w2_stacked_weight, is_gated_mlp)
    check_same_dtype(name, x, w1_stacked_weight, w2_stacked_weight)
    check_contiguous(name, w1_stacked_weight=w1_stacked_weight, w2_stacked_weight=w2_stacked_weight)

    def compute(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return grouped_moe(rows, ids, weights, w1_stacked_weight, w2_stacked_weight, act, apply_routing_on_input)

    return run_routed(name, x, selected_experts, routing_weights, experts, compute, mapping_config, max_num_tokens)


@operator(fake=like_x, needs=(TRITON,), instead="torch_quant_fp8_moe")
@recorded(unread=("w3_weight", "w3_input_scale", "w3_weight_scale"))
def triton_quant_fp8_moe(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    w1_weight: Tensor,
    w2_weight: Tensor,
    w3_weight: Tensor,
    w1_input_scale: Tensor,
    w2_input_scale: Tensor,
    w3_input_scale: Tensor,
    w1_weight_scale: Tensor,
    w2_weight_scale: Tensor,
    w3_weight_scale: Tensor,
    is_gated_mlp: bool = False,
    act_fn: int = 4,
    mapping_config: str = "",
    max_num_tokens: int = 0,
    apply_routing_on_input: bool = False,
) -> Tensor:
    """Mixture of experts on e4m3 weights and activations, stacked as in `triton_moe_fused`.

    w1_weight e4m3 [E, I, H] with Relu2, or [E, 2I, H] (w3 rows, then w1 rows, one scale for both) when gated;
    w2_weight e4m3 [E, H, I]; the w3 arguments are not used. Input scales [1] or [E], of which the first counts;
    weight scales [E], or of blocks of 128 x 128: w1 [E, ceil(I/128), ceil(H/128)] (twice as many rows when gated: w3's,
    then w1's) and w2 [E, ceil(H/128), ceil(I/128)]. x is quantised to clamp(x / w1_input_scale, -448, 448), the
    activation with w2_input_scale. Not gated, Silu (the schema's default) is read as Relu2.
    """
    name = "triton_quant_fp8_moe"
    act = activation(name, is_gated_mlp, RELU2 if not is_gated_mlp and act_fn == SILU else act_fn)
    experts, _ = check_stacked(name, x, w1_weight, w2_weight, is_gated_mlp)
    check_fp8(name, w1_weight, w2_weight, is_gated_mlp, w1_weight_scale, w2_weight_scale, blocks=True)
    check_contiguous(name, w1_weight=w1_weight, w2_weight=w2_weight)
    require_one_device(name, x, w1_input_scale, w2_input_scale, w1_weight_scale, w2_weight_scale)
    s1 = first_scale(name, "w1_input_scale", w1_input_scale, experts)
    s2 = first_scale(name, "w2_input_scale", w2_input_scale, experts)
    scales = FP8Scales(s1, w1_weight_scale.float().contiguous(), s2, w2_weight_scale.float().contiguous(), True)

    def compute(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return grouped_moe(rows, ids, weights, w1_weight, w2_weight, act, apply_routing_on_input, scales)

    return run_routed(name, x, selected_experts, routing_weights, experts, compute, mapping_config, max_num_tokens)
