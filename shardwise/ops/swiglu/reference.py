"""SwiGLU MLPs in plain PyTorch. Source: Shazeer, arXiv:2002.05202.

x [..., H]; gate and up weights [I, H], down weight [H, I]. The fused forms take gate and up as one matrix [2I, H], the
gate's rows first, and so need one product less. Quantised forms compute in x's dtype.
"""

import torch
from torch.nn.functional import linear, silu

from shardwise.ops.dtypes import check_float
from shardwise.ops.quantization.fp8 import dequantize_fp8_blocks
from shardwise.ops.quantization.reference import torch_quant_nvfp4_linear
from shardwise.ops.registry import operator


def like_input(input, *_args, **_kwargs):
    """Fake of every SwiGLU operator: the hidden size comes back."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def check(op: str, input: torch.Tensor, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    """Errors unless the (unpacked) weights are up [I, H] and down [H, I] for input [..., H] of floats."""
    check_float(op, "input", input)
    hidden = input.shape[-1]
    if len(up) != 2 or len(down) != 2 or up[1] != hidden or down != (hidden, up[0]):
        raise ValueError(
            f"{op}: input {tuple(input.shape)} needs gate and up weights [I, {hidden}] and a down weight "
            f"[{hidden}, I], got {tuple(up)} and {tuple(down)}"
        )


def check_layers(
    op: str, input: torch.Tensor, **layers: tuple[torch.Tensor, torch.Tensor | None, tuple[int, ...]]
) -> None:
    """ValueError unless each layer's (weight, bias, shape) has that shape and a bias of its rows, TypeError unless all
    have the input's dtype."""
    for name, (weight, bias, shape) in layers.items():
        if weight.shape != shape or (bias is not None and bias.shape != shape[:1]):
            came = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"{op}: {name}_weight is {tuple(weight.shape)}, {name}_bias {came}; legal for these inputs: "
                f"{tuple(shape)}, {tuple(shape[:1])}"
            )
        if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
            raise TypeError(
                f"{op}: {name}_weight is {weight.dtype}, {name}_bias {None if bias is None else bias.dtype}; legal: "
                f"input's {input.dtype}"
            )


def _activated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def check_separate(op: str, input, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias) -> None:
    """`check` and `check_layers` of three projections."""
    inner, outer = up_weight.shape, down_weight.shape
    check(op, input, inner, outer)
    check_layers(
        op, input, gate=(gate_weight, gate_bias, inner), up=(up_weight, up_bias, inner),
        down=(down_weight, down_bias, outer),
    )  # fmt: skip


@operator(fake=like_input)
def torch_swiglu_mlp(
    input: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) from three projections."""
    check_separate(
        "torch_swiglu_mlp", input, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias
    )  # fmt: skip
    gate, up = linear(input, gate_weight, gate_bias), linear(input, up_weight, up_bias)
    return linear(silu(gate) * up, down_weight, down_bias)


@operator(fake=like_input)
def fused_swiglu_mlp(
    input: torch.Tensor,
    gate_up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `torch_swiglu_mlp` with gate and up in one product."""
    op, size, hidden = "fused_swiglu_mlp", gate_up_weight.shape[0] // 2, input.shape[-1]
    check(op, input, (size, *gate_up_weight.shape[1:]), tuple(down_weight.shape))
    check_layers(
        op, input, gate_up=(gate_up_weight, gate_up_bias, (2 * size, hidden)),
        down=(down_weight, down_bias, (hidden, size)),
    )  # fmt: skip
    return linear(_activated(linear(input, gate_up_weight, gate_up_bias)), down_weight, down_bias)


@operator(fake=like_input)
def torch_finegrained_fp8_swiglu_mlp(
    input: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_weight_scale: torch.Tensor,
    up_weight_scale: torch.Tensor,
    down_weight_scale: torch.Tensor,
) -> torch.Tensor:
    """Weights float8_e4m3fn with float32 scales of 128 x 128 blocks, [ceil(N/128), ceil(K/128)]."""
    op = "torch_finegrained_fp8_swiglu_mlp"
    check(op, input, tuple(up_weight.shape), tuple(down_weight.shape))
    _check_gate(op, gate_weight, up_weight)
    gate, up, down = (
        dequantize_fp8_blocks(codes, scale, dtype=input.dtype)
        for codes, scale in (
            (gate_weight, gate_weight_scale),
            (up_weight, up_weight_scale),
            (down_weight, down_weight_scale),
        )
    )
    return linear(silu(linear(input, gate)) * linear(input, up), down)


@operator(fake=like_input)
def fused_finegrained_fp8_swiglu_mlp(
    input: torch.Tensor,
    gate_up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_up_weight_scale: torch.Tensor,
    down_weight_scale: torch.Tensor,
) -> torch.Tensor:
    """As `torch_finegrained_fp8_swiglu_mlp`, gate and up concatenated; I a multiple of 128, a whole block."""
    op = "fused_finegrained_fp8_swiglu_mlp"
    rows = gate_up_weight.shape[0]
    check(op, input, (rows // 2, *gate_up_weight.shape[1:]), tuple(down_weight.shape))
    if rows % 256:
        raise ValueError(f"{op}: I = {rows // 2} must be a multiple of 128, the scales' block")
    gate_up = dequantize_fp8_blocks(gate_up_weight, gate_up_weight_scale, dtype=input.dtype)
    down = dequantize_fp8_blocks(down_weight, down_weight_scale, dtype=input.dtype)
    return linear(_activated(linear(input, gate_up)), down)


@operator(fake=like_input)
def torch_nvfp4_swiglu_mlp(
    input: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_input_scale: torch.Tensor,
    gate_weight_scale: torch.Tensor,
    gate_alpha: torch.Tensor,
    up_input_scale: torch.Tensor,
    up_weight_scale: torch.Tensor,
    up_alpha: torch.Tensor,
    down_input_scale: torch.Tensor,
    down_weight_scale: torch.Tensor,
    down_alpha: torch.Tensor,
) -> torch.Tensor:
    """Three `torch_quant_nvfp4_linear`: packed uint8 weights [N, K/2], swizzled block scales, one alpha each."""
    _check_packed("torch_nvfp4_swiglu_mlp", input, up_weight, down_weight, up_weight.shape[0])
    _check_gate("torch_nvfp4_swiglu_mlp", gate_weight, up_weight)
    gate = torch_quant_nvfp4_linear(input, gate_weight, None, gate_input_scale, gate_weight_scale, gate_alpha)
    up = torch_quant_nvfp4_linear(input, up_weight, None, up_input_scale, up_weight_scale, up_alpha)
    return torch_quant_nvfp4_linear(silu(gate) * up, down_weight, None, down_input_scale, down_weight_scale, down_alpha)


@operator(fake=like_input)
def fused_nvfp4_swiglu_mlp(
    input: torch.Tensor,
    gate_up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_up_input_scale: torch.Tensor,
    gate_up_weight_scale: torch.Tensor,
    gate_up_alpha: torch.Tensor,
    down_input_scale: torch.Tensor,
    down_weight_scale: torch.Tensor,
    down_alpha: torch.Tensor,
) -> torch.Tensor:
    """As `torch_nvfp4_swiglu_mlp`, gate and up concatenated under one input scale and alpha."""
    _check_packed("fused_nvfp4_swiglu_mlp", input, gate_up_weight, down_weight, gate_up_weight.shape[0] // 2)
    gate_up = torch_quant_nvfp4_linear(
        input, gate_up_weight, None, gate_up_input_scale, gate_up_weight_scale, gate_up_alpha
    )
    hidden = _activated(gate_up)
    return torch_quant_nvfp4_linear(hidden, down_weight, None, down_input_scale, down_weight_scale, down_alpha)


def _check_gate(op: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.shape != up.shape:
        raise ValueError(f"{op}: gate_weight {tuple(gate.shape)} must have the shape of up_weight {tuple(up.shape)}")


def _check_packed(op: str, input: torch.Tensor, up: torch.Tensor, down: torch.Tensor, intermediate: int) -> None:
    check(op, input, (intermediate, 2 * up.shape[-1]), (down.shape[0], 2 * down.shape[-1]))
