"""Mixture of experts over quantised linears in plain PyTorch: FP8 and NVFP4, one weight tensor an expert."""

from torch import Tensor

from shardwise.ops.moe.contract import like_x, reference_activation
from shardwise.ops.moe.reference import check_lists, run_experts
from shardwise.ops.quantization.reference import torch_quant_fp8_linear, torch_quant_nvfp4_linear
from shardwise.ops.registry import operator


def _run(name, x, ids, weights, w1, w2, w3, gated, act_fn, packed, linear, tail, **scales) -> Tensor:
    """`linear(which, expert, rows)` applies weight `which` (0 gate, 1 down, 2 up) of an expert; `scales`: its lists.

    packed   values of a byte of the weights
    """
    act = reference_activation(name, act_fn)
    check_lists(name, x, gated, w1, w2, w3, packed)
    for label, lists in scales.items():
        if [len(part) for part in lists] != [len(w1), len(w2), len(w3)]:
            raise ValueError(
                f"{name}: the lists w1_{label}, w2_{label} and w3_{label} must be as long as the weights' "
                f"({len(w1)}, {len(w2)}, {len(w3)}), got {', '.join(str(len(part)) for part in lists)}"
            )

    def mlp(expert: int, rows: Tensor) -> Tensor:
        hidden = act(linear(0, expert, rows))
        if gated:
            hidden = hidden * linear(2, expert, rows)
        return linear(1, expert, hidden)

    return run_experts(name, x, ids, weights, len(w1), mlp, *tail)


@operator(fake=like_x)
def torch_quant_fp8_moe(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    w1_weight: list[Tensor],
    w2_weight: list[Tensor],
    w3_weight: list[Tensor],
    w1_input_scale: list[Tensor],
    w2_input_scale: list[Tensor],
    w3_input_scale: list[Tensor],
    w1_weight_scale: list[Tensor],
    w2_weight_scale: list[Tensor],
    w3_weight_scale: list[Tensor],
    is_gated_mlp: bool = True,
    act_fn: int = 4,
    mapping_config: str = "",
    max_num_tokens: int = 0,
    apply_routing_on_input: bool = False,
) -> Tensor:
    """`torch_moe` with every linear a `torch_quant_fp8_linear`: e4m3 weights, one scale for input and weight each.

    Scales are lists, an entry an expert, of one-element tensors, those of weights also of blocks of 128 x 128
    (`torch_quant_fp8_linear`); the w3 lists are empty when not gated.
    """
    weight = (w1_weight, w2_weight, w3_weight)
    s_in = (w1_input_scale, w2_input_scale, w3_input_scale)
    s_weight = (w1_weight_scale, w2_weight_scale, w3_weight_scale)

    def linear(which: int, expert: int, rows: Tensor) -> Tensor:
        return torch_quant_fp8_linear(
            rows, weight[which][expert], None, s_in[which][expert], s_weight[which][expert]
        )  # fmt: skip

    tail = (mapping_config, max_num_tokens, apply_routing_on_input)
    name = "torch_quant_fp8_moe"
    return _run(
        name, x, selected_experts, routing_weights, *weight, is_gated_mlp, act_fn, 1, linear, tail,
        input_scale=s_in, weight_scale=s_weight,
    )  # fmt: skip


@operator(fake=like_x)
def torch_quant_nvfp4_moe(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    w1_weight: list[Tensor],
    w2_weight: list[Tensor],
    w3_weight: list[Tensor],
    w1_input_scale: list[Tensor],
    w2_input_scale: list[Tensor],
    w3_input_scale: list[Tensor],
    w1_weight_scale: list[Tensor],
    w2_weight_scale: list[Tensor],
    w3_weight_scale: list[Tensor],
    w1_alpha: list[Tensor],
    w2_alpha: list[Tensor],
    w3_alpha: list[Tensor],
    is_gated_mlp: bool = True,
    act_fn: int = 4,
    mapping_config: str = "",
    max_num_tokens: int = 0,
    apply_routing_on_input: bool = False,
) -> Tensor:
    """`torch_moe` with every linear a `torch_quant_nvfp4_linear`: weights uint8 [I, H/2] and [H, I/2], swizzled
    block scales, alpha = 1 / (input's * weight's global scale). Lists hold an entry an expert.
    """
    weight = (w1_weight, w2_weight, w3_weight)
    s_in = (w1_input_scale, w2_input_scale, w3_input_scale)
    s_weight = (w1_weight_scale, w2_weight_scale, w3_weight_scale)
    alpha = (w1_alpha, w2_alpha, w3_alpha)

    def linear(which: int, expert: int, rows: Tensor) -> Tensor:
        return torch_quant_nvfp4_linear(
            rows, weight[which][expert], None, s_in[which][expert], s_weight[which][expert], alpha[which][expert]
        )

    tail = (mapping_config, max_num_tokens, apply_routing_on_input)
    name = "torch_quant_nvfp4_moe"
    return _run(
        name, x, selected_experts, routing_weights, *weight, is_gated_mlp, act_fn, 2, linear, tail,
        input_scale=s_in, weight_scale=s_weight, alpha=alpha,
    )  # fmt: skip
