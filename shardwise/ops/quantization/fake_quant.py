"""Linears that dequantise their weights and compute in the input's dtype: quantisation simulated on any device.

All four share one argument list; scales and zero points come as lists of which the documented elements are used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.quantization.int4 import dequantize_int4_awq, dequantize_int4_gptq
from shardwise.ops.quantization.nvfp4 import round_nvfp4
from shardwise.ops.quantization.reference import check_linear, check_one_element, linear_fake, nvfp4_weight
from shardwise.ops.registry import operator


def _element(name: str, label: str, scales: list[Tensor], index: int = 0) -> Tensor:
    if len(scales) <= index or scales[index] is None:
        raise ValueError(f"{name}: {label} needs {index + 1} element(s), got {len(scales)}")
    return scales[index]


@operator(fake=linear_fake)
def torch_fake_quant_fp8_linear(
    input: Tensor,
    weight_quantized: Tensor,
    bias: Tensor | None,
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    input_zp: list[Tensor],
    weight_zp: list[Tensor],
) -> Tensor:
    """Linear with an e4m3 weight [N, K] and an input rounded to e4m3: scales are element 0 of each list.

    The input is cast plainly: a value beyond 464 times the scale becomes NaN or saturates, as PyTorch's cast does on
    the device. Zero points are not used.
    """
    name = "torch_fake_quant_fp8_linear"
    if weight_quantized.dtype != torch.float8_e4m3fn:
        raise TypeError(f"{name}: weight_quantized must be float8_e4m3fn, got {weight_quantized.dtype}")
    check_linear(name, input, bias, weight_quantized.shape[0])
    if weight_quantized.dim() != 2 or weight_quantized.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{name}: weight_quantized must be [N, K] with K = {input.shape[-1]}, got {tuple(weight_quantized.shape)}"
        )
    s_in, s_weight = _element(name, "input_scale", input_scale), _element(name, "weight_scale", weight_scale)
    check_one_element(name, input_scale=s_in, weight_scale=s_weight)
    rounded = (input / s_in).to(torch.float8_e4m3fn).to(input.dtype) * s_in
    weight = weight_quantized.to(input.dtype) * s_weight
    return _linear(input.dtype, rounded, weight, bias)


@operator(fake=linear_fake)
def torch_fake_quant_nvfp4_linear(
    input: Tensor,
    weight_quantized: Tensor,
    bias: Tensor | None,
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    input_zp: list[Tensor],
    weight_zp: list[Tensor],
) -> Tensor:
    """Linear with an NVFP4 weight uint8 [N, K/2] and an input rounded to NVFP4 in blocks of 16.

    input_scale[0] = 2688 / amax(input); weight_scale[0] = swizzled block scales, weight_scale[1] =
    1 / (input_scale * weight's global scale). Zero points are not used.
    """
    name = "torch_fake_quant_nvfp4_linear"
    check_linear(name, input, bias, weight_quantized.shape[0])
    global_in = _element(name, "input_scale", input_scale).float()
    swizzled, alpha = _element(name, "weight_scale", weight_scale), _element(name, "weight_scale", weight_scale, 1)
    check_one_element(name, **{"input_scale": global_in, "weight_scale[1]": alpha})
    weight = nvfp4_weight(name, weight_quantized, swizzled, input.shape[-1]) * (alpha.float() * global_in)
    rounded = round_nvfp4(input, global_in) / global_in
    return _linear(input.dtype, rounded, weight, bias)


def _int4_fake(input, weight_quantized, bias, input_scale, weight_scale, input_zp, weight_zp):
    return input.new_empty(*input.shape[:-1], weight_quantized.shape[-2] * 2)


@operator(fake=_int4_fake)
def torch_fake_quant_int4_linear(
    input: Tensor,
    weight_quantized: Tensor,
    bias: Tensor | None,
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    input_zp: list[Tensor],
    weight_zp: list[Tensor],
) -> Tensor:
    """Linear with an AWQ weight uint8 [N/2, K] (see quantization/int4.py), scales weight_scale[0] [N, K/128].

    input_scale[0] is the pre-quantisation scale, per channel [K] or one element, multiplied on the input.
    """
    name = "torch_fake_quant_int4_linear"
    if weight_quantized.dtype != torch.uint8:
        raise TypeError(f"{name}: weight_quantized must be uint8, got {weight_quantized.dtype}")
    check_linear(name, input, bias, 2 * weight_quantized.shape[0])
    if weight_quantized.dim() != 2 or weight_quantized.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{name}: weight_quantized must be [N/2, K] with K = {input.shape[-1]}, got {tuple(weight_quantized.shape)}"
        )
    before = _element(name, "input_scale", input_scale)
    if before.numel() not in (1, input.shape[-1]):
        raise ValueError(
            f"{name}: input_scale must have 1 or K = {input.shape[-1]} elements, got {tuple(before.shape)}"
        )
    weight = dequantize_int4_awq(weight_quantized, _element(name, "weight_scale", weight_scale), name)
    return _linear(input.dtype, input * before, weight, bias)


def _gptq_fake(input, weight_quantized, bias, input_scale, weight_scale, input_zp, weight_zp):
    return input.new_empty(*input.shape[:-1], weight_quantized.shape[1])


@operator(fake=_gptq_fake)
def torch_fake_quant_int4_gptq_linear(
    input: Tensor,
    weight_quantized: Tensor,
    bias: Tensor | None,
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    input_zp: list[Tensor],
    weight_zp: list[Tensor],
) -> Tensor:
    """Linear with a GPTQ weight int32 [K/8, N] (see quantization/int4.py): scales weight_scale[0] [G, N], zeros
    weight_zp[0] int32 [G, N/8], used as stored. input_scale and input_zp are not used.
    """
    name = "torch_fake_quant_int4_gptq_linear"
    if weight_quantized.dtype != torch.int32:
        raise TypeError(f"{name}: weight_quantized must be int32, got {weight_quantized.dtype}")
    check_linear(name, input, bias, weight_quantized.shape[-1])
    if weight_quantized.dim() != 2 or weight_quantized.shape[0] * 8 != input.shape[-1]:
        raise ValueError(
            f"{name}: weight_quantized must be [K/8, N] with K = {input.shape[-1]}, got {tuple(weight_quantized.shape)}"
        )
    scales, zeros = _element(name, "weight_scale", weight_scale), _element(name, "weight_zp", weight_zp)
    return _linear(input.dtype, input, dequantize_int4_gptq(weight_quantized, scales, zeros, name).t(), bias)


def _linear(dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
