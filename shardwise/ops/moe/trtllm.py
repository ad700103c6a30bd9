"""TRT-LLM's mixtures of experts: on FlashInfer's kernels where these can run (`cutlass.py`), else on our own."""

import torch
from torch import Tensor

from shardwise.ops.devices import require_one_device
from shardwise.ops.kernel_launch import Kept
from shardwise.ops.moe.contract import (
    FP8Scales,
    activation,
    check_contiguous,
    check_elements,
    check_fp8,
    check_same_dtype,
    check_stacked,
    first_scale,
    like_x,
    parse_mapping,
)
from shardwise.ops.moe.cutlass import KERNELS, cutlass_moe, on_cutlass
from shardwise.ops.moe.exchange import run_routed
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.moe.mxfp4_layout import PackedOnce
from shardwise.ops.moe.nvfp4 import Weight, nvfp4_moe, packed_once
from shardwise.ops.quantization.triton_fp8 import quantize
from shardwise.ops.recorded import recorded
from shardwise.ops.registry import TRITON, operator


def _check_exchange(name: str, mapping_config: str, max_num_tokens: int) -> None:
    if parse_mapping(mapping_config).exchanges_tokens and max_num_tokens <= 0:
        raise ValueError(f"{name}: mapping_config asks for a token exchange, which needs max_num_tokens > 0")


@operator(fake=like_x, needs=(KERNELS, TRITON), instead="torch_moe_fused")
@recorded()
def trtllm_moe_fused(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    w3_w1_stacked_weight: Tensor,
    w2_stacked_weight: Tensor,
    is_gated_mlp: bool = True,
    act_fn: int = 4,
    mapping_config: str = "",
    max_num_tokens: int = 0,
    apply_routing_on_input: bool = False,
) -> Tensor:
    """Mixture of experts in bf16 or fp16.

    Gated with Silu (4) or Swiglu (5): w3_w1_stacked_weight [E, 2I, H], rows of w3 (up), then w1 (gate). Not gated
    with Relu2 (8): [E, I, H]. w2_stacked_weight [E, H, I]. The rest as in `torch_moe`; a token exchange needs
    max_num_tokens.
    """
    name = "trtllm_moe_fused"
    act = activation(name, is_gated_mlp, act_fn)
    experts, _ = check_stacked(name, x, w3_w1_stacked_weight, w2_stacked_weight, is_gated_mlp)
    check_same_dtype(name, x, w3_w1_stacked_weight, w2_stacked_weight)
    check_contiguous(name, w3_w1_stacked_weight=w3_w1_stacked_weight, w2_stacked_weight=w2_stacked_weight)
    _check_exchange(name, mapping_config, max_num_tokens)
    weights = (w3_w1_stacked_weight, w2_stacked_weight)

    def compute(rows: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        if on_cutlass(rows, *weights, apply_routing_on_input):
            return cutlass_moe(rows, ids, routing, *weights, act, rows.dtype, [])
        return grouped_moe(rows, ids, routing, *weights, act, apply_routing_on_input)

    return run_routed(name, x, selected_experts, routing_weights, experts, compute, mapping_config, max_num_tokens)


def _fp8_fake(
    x,
    selected_experts,
    routing_weights,
    fc1_expert_weights,
    fc2_expert_weights,
    fc1_act_scale,
    fc1_dequant_scale,
    fc2_act_scale_reciprocal,
    fc2_dequant_scale,
    is_gated_mlp=True,
    act_fn=4,
    *_tail,
    **_options,
):
    activation("trtllm_quant_fp8_moe_fused", is_gated_mlp, act_fn)
    if fc1_dequant_scale.dim() != 1 or fc2_dequant_scale.dim() != 1:
        raise ValueError("trtllm_quant_fp8_moe_fused: fc1_dequant_scale and fc2_dequant_scale must be [E]")
    return like_x(x)


@operator(fake=_fp8_fake, needs=(KERNELS, TRITON), instead="torch_quant_fp8_moe")
@recorded()
def trtllm_quant_fp8_moe_fused(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    fc1_act_scale: Tensor,
    fc1_dequant_scale: Tensor,
    fc2_act_scale_reciprocal: Tensor,
    fc2_dequant_scale: Tensor,
    is_gated_mlp: bool = True,
    act_fn: int = 4,
    mapping_config: str = "",
    max_num_tokens: int = 0,
    apply_routing_on_input: bool = False,
) -> Tensor:
    """Mixture of experts on e4m3 weights and activations; layouts as in `trtllm_moe_fused`.

    fc1_act_scale              one element s1: x is quantised to x / s1
    fc1_dequant_scale          [E]: scale of fc1's weights * s1
    fc2_act_scale_reciprocal   one element 1 / s2: the activation is quantised to h / s2
    fc2_dequant_scale          [E]: scale of fc2's weights * s2
    """
    name = "trtllm_quant_fp8_moe_fused"
    act = activation(name, is_gated_mlp, act_fn)
    experts, _ = check_stacked(name, x, fc1_expert_weights, fc2_expert_weights, is_gated_mlp)
    check_fp8(name, fc1_expert_weights, fc2_expert_weights, is_gated_mlp, fc1_dequant_scale, fc2_dequant_scale)
    check_contiguous(name, fc1_expert_weights=fc1_expert_weights, fc2_expert_weights=fc2_expert_weights)
    require_one_device(name, x, fc1_act_scale, fc1_dequant_scale, fc2_act_scale_reciprocal, fc2_dequant_scale)
    _check_exchange(name, mapping_config, max_num_tokens)
    weights = (fc1_expert_weights, fc2_expert_weights)
    s1 = first_scale(name, "fc1_act_scale", fc1_act_scale, experts)
    reciprocal = first_scale(name, "fc2_act_scale_reciprocal", fc2_act_scale_reciprocal, experts)
    dequant = fc1_dequant_scale.float().contiguous(), fc2_dequant_scale.float().contiguous()
    scales = FP8Scales(s1, dequant[0], reciprocal, dequant[1], False)

    def compute(rows: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        if on_cutlass(rows, *weights, apply_routing_on_input):
            quant = [scales.first, reciprocal.reshape(()), scales.second, s1.reshape(())]
            return cutlass_moe(quantize(rows, s1), ids, routing, *weights, act, rows.dtype, quant)
        return grouped_moe(rows, ids, routing, *weights, act, apply_routing_on_input, scales)

    return run_routed(name, x, selected_experts, routing_weights, experts, compute, mapping_config, max_num_tokens)


def _nvfp4(name: str, label: str, codes: Tensor, scales: Tensor, alpha: Tensor, act_scale: Tensor) -> Weight:
    """Codes, block scales and 1 / weight's global scale of one stack; errors for dtypes and scales of other sizes."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"{name}: {label}_expert_weights_fp4 must be uint8, got {codes.dtype}")
    if scales.dtype not in (torch.uint8, torch.float8_e4m3fn) or scales.dim() != 3:
        raise ValueError(
            f"{name}: {label}_weight_blockscale_fp8 must be uint8 or float8_e4m3fn with 3 dimensions, "
            f"got {scales.dtype} {tuple(scales.shape)}"
        )
    for what, scale in ((f"{label}_alpha", alpha), (f"{label}_act_global_scale", act_scale)):
        check_elements(name, what, scale, codes.shape[0])
    return codes, scales, _factor(alpha, act_scale, codes.shape[0])


_FACTORS: PackedOnce[Tensor] = PackedOnce()


def _factor(alpha: Tensor, act_scale: Tensor, experts: int) -> Tensor:
    """1 / the weight's global scale, float32 [E], made once for these tensors."""

    def made() -> Tensor:
        return (alpha.reshape(-1).float() * act_scale.reshape(-1).float()).expand(experts).contiguous()

    return _FACTORS.get((alpha, act_scale), str(experts), made)


_READ: PackedOnce[tuple[Kept, None]] = PackedOnce()


def _packed(*args) -> tuple[Kept, None]:
    """What the kernels of the operator below read of the weights among its arguments."""
    codes, down_codes, scales, down_scales, act_scale, down_act_scale, alpha, down_alpha, *options = args[3:]
    act = "silu" if not options or options[0] else "relu2"

    def made() -> tuple[Kept, None]:
        first = codes, scales, _factor(alpha, act_scale, codes.shape[0])
        second = down_codes, down_scales, _factor(down_alpha, down_act_scale, down_codes.shape[0])
        up, down = packed_once("trtllm_quant_nvfp4_moe_fused", first, second, act)
        return Kept((up.words, up.scales, up.bias, down.words, down.scales, down.bias, first[2], second[2])), None

    return _READ.get(args[3:11], act, made)


@operator(fake=like_x, needs=(TRITON,), instead="torch_quant_nvfp4_moe")
@recorded(beside=_packed)
def trtllm_quant_nvfp4_moe_fused(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    fc1_expert_weights_fp4: Tensor,
    fc2_expert_weights_fp4: Tensor,
    fc1_weight_blockscale_fp8: Tensor,
    fc2_weight_blockscale_fp8: Tensor,
    fc1_act_global_scale: Tensor,
    fc2_act_global_scale: Tensor,
    fc1_alpha: Tensor,
    fc2_alpha: Tensor,
    is_gated_mlp: bool = True,
    act_fn: int = 4,
    mapping_config: str = "",
    max_num_tokens: int = 0,
    apply_routing_on_input: bool = False,
) -> Tensor:
    """Mixture of experts with NVFP4 weights; on Hopper activations stay in bf16 (weights only are quantised).

    fc1_expert_weights_fp4     uint8 [E, 2I, H/2] (w3 rows, then w1 rows) or [E, I, H/2] with Relu2
    fc2_expert_weights_fp4     uint8 [E, H, I/2]
    *_weight_blockscale_fp8    e4m3 or uint8 [E, rows padded to 128, columns / 16 padded to 4], swizzled
    *_act_global_scale         2688 / amax of the activations, one element or [E]
    *_alpha                    [E]: 1 / (act_global_scale * weight's global scale)
    Weights are re-laid out at the first call and kept as long as their tensors live.
    """
    name = "trtllm_quant_nvfp4_moe_fused"
    act = activation(name, is_gated_mlp, act_fn)
    experts, _ = check_stacked(name, x, fc1_expert_weights_fp4, fc2_expert_weights_fp4, is_gated_mlp, packed=2)
    _check_exchange(name, mapping_config, max_num_tokens)
    require_one_device(
        name, x, fc1_weight_blockscale_fp8, fc2_weight_blockscale_fp8, fc1_act_global_scale, fc2_act_global_scale,
        fc1_alpha, fc2_alpha,
    )  # fmt: skip
    first = _nvfp4(name, "fc1", fc1_expert_weights_fp4, fc1_weight_blockscale_fp8, fc1_alpha, fc1_act_global_scale)
    second = _nvfp4(name, "fc2", fc2_expert_weights_fp4, fc2_weight_blockscale_fp8, fc2_alpha, fc2_act_global_scale)

    def compute(rows: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        return nvfp4_moe(name, rows, ids, routing, first, second, act, apply_routing_on_input)

    return run_routed(name, x, selected_experts, routing_weights, experts, compute, mapping_config, max_num_tokens)
