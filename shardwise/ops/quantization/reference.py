"""Quantised linears in plain PyTorch, on CPU and CUDA. FP8 uses the GPU's own matrix units where it has them."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.quantization.floats import e4m3_encode
from shardwise.ops.quantization.fp8 import BLOCK, dequantize_fp8_blocks
from shardwise.ops.quantization.nvfp4 import dequantize_nvfp4, round_nvfp4, unswizzle_scales
from shardwise.ops.registry import operator

_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_linear(name: str, input: Tensor, bias: Tensor | None, outputs: int) -> None:
    """TypeError unless input is [..., K], floating, of 16 bits or more; ValueError unless bias has N elements."""
    if input.dtype not in _PLAIN or not input.dim():
        raise TypeError(
            f"{name}: input must be [..., K] in bfloat16, float16, float32 or float64, got {list(input.shape)} in "
            f"{input.dtype}"
        )
    if bias is not None and bias.numel() != outputs:
        raise ValueError(f"{name}: bias must have N = {outputs} elements, got {tuple(bias.shape)}")


def check_one_element(name: str, **scales: Tensor) -> None:
    """ValueError for a scale that has not one element."""
    for label, scale in scales.items():
        if scale.numel() != 1:
            raise ValueError(f"{name}: {label} must have one element, got {tuple(scale.shape)}")


def _same_shape(x, scale):
    return torch.empty_like(x)


@operator(fake=_same_shape)
def torch_quant_fn(x: Tensor, scale: Tensor) -> Tensor:
    """Fake int8 quantisation: clamp(round(x / scale), -128, 127) * scale, ties to even; x's shape and dtype.

    scale has one element, or is shared by x along its dimensions of 1 (a scale a channel); float32 or wider.
    """
    if x.dtype not in _PLAIN:
        raise TypeError(f"torch_quant_fn: x must be floating point, got {x.dtype}")
    if scale.numel() == 1:
        scale = scale.reshape(())
    elif scale.dim() > x.dim() or any(a not in (1, b) for a, b in zip(scale.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(
            f"torch_quant_fn: scale {tuple(scale.shape)} must have one element or broadcast to x {tuple(x.shape)}"
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.clamp(torch.round(wide / scale), -128, 127) * scale).to(x.dtype)


def linear_fake(input, weight, *_args, **_options):
    """Fake of the linears whose weight has a row an output."""
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@operator(fake=linear_fake)
def torch_quant_fp8_linear(
    input: Tensor,
    weight_fp8: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Linear layer on float8_e4m3fn operands with one scale each.

    input         [..., K] floating point, quantised here to clamp(input / input_scale, -448, 448)
    weight_fp8    [N, K] float8_e4m3fn
    bias          [N] or None
    input_scale   one float32 element, required
    weight_scale  one float32 element, or those of blocks of 128 x 128 [ceil(N/128), ceil(K/128)]; required
    Returns [..., N] in input's dtype: codes' product * input_scale * weight_scale + bias, summed in float32.
    The input is quantised by three elementwise operations; `trtllm_quant_fp8_linear` does it in one launch.
    """
    name = "torch_quant_fp8_linear"
    s_in, s_weight = check_fp8_linear(name, input, weight_fp8, bias, input_scale, weight_scale, blocks=True)
    codes = e4m3_encode(input.reshape(-1, input.shape[-1]) / s_in.reshape(1))  # one element of one dim: in float32
    if s_weight.numel() > 1:
        weight = dequantize_fp8_blocks(weight_fp8, s_weight, dtype=torch.float32)
        out = (codes.float() @ weight.t() * s_in).to(input.dtype)
    else:
        out = scaled_mm(codes, weight_fp8, s_in, s_weight, input.dtype)
    out = out.view(*input.shape[:-1], weight_fp8.shape[0])
    return out if bias is None else (out + bias).to(input.dtype)


def check_fp8_linear(
    name, input, weight_fp8, bias, input_scale, weight_scale, blocks: bool = False
) -> tuple[Tensor, Tensor]:
    """The two scales in float32; TypeError or ValueError naming operator and argument.

    blocks   the weight may have scales of blocks of 128 x 128
    """
    check_linear(name, input, bias, weight_fp8.shape[0])
    if weight_fp8.dtype != torch.float8_e4m3fn:
        raise TypeError(f"{name}: weight_fp8 must be float8_e4m3fn, got {weight_fp8.dtype}")
    if weight_fp8.dim() != 2 or weight_fp8.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{name}: weight_fp8 must be [N, K] with K = {input.shape[-1]} as in input, got {tuple(weight_fp8.shape)}"
        )
    tiles = tuple(-(-size // BLOCK) for size in weight_fp8.shape)
    for label, scale in (("input_scale", input_scale), ("weight_scale", weight_scale)):
        by_block = blocks and label == "weight_scale"
        if scale is None or (scale.numel() != 1 and not (by_block and tuple(scale.shape) == tiles)):
            got = "None" if scale is None else tuple(scale.shape)
            other = f", or {list(tiles)} for blocks of {BLOCK} x {BLOCK}" if by_block else ""
            raise ValueError(f"{name}: {label} must be a tensor with one element{other}, got {got}")
    return input_scale.float(), weight_scale.float()


def scaled_mm(codes: Tensor, weight: Tensor, s_in: Tensor, s_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 [M, K] x e4m3 [N, K]^T * s_in * s_weight (one float32 element each) in `dtype`, contiguous, on the GPU's FP8
    units if it has them.

    K and N are padded to the multiples of 16 which those units ask for.
    """
    if codes.shape[0] == 0 or not _native_fp8(codes.device) or dtype == torch.float64:
        return (codes.float() @ weight.float().t() * (s_in * s_weight).reshape(())).to(dtype)
    columns = weight.shape[0]
    codes, weight = _padded(codes, weight)
    out = torch._scaled_mm(
        codes, weight.t(), _own_scale(s_in), _own_scale(s_weight), out_dtype=dtype, use_fast_accum=True
    )
    return out[:, :columns].contiguous()


@torch.no_grad()  # which products that write `out` ask for
def _scaled_bmm(codes: Tensor, weight: Tensor, s_in: Tensor, s_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled_mm` of each pair of [B, M, K] and [B, N, K]: one launch a pair, which is all that PyTorch has for FP8."""
    columns = weight.shape[1]
    codes, weight = _padded(codes, weight)
    s_in, s_weight = _own_scale(s_in), _own_scale(s_weight)
    out = torch.empty(*codes.shape[:2], weight.shape[1], dtype=dtype, device=codes.device)
    for left, right, product in zip(codes, weight.transpose(1, 2), out, strict=True):
        torch._scaled_mm(left, right, s_in, s_weight, out_dtype=dtype, use_fast_accum=True, out=product)
    return out[..., :columns].contiguous()


def _own_scale(scale: Tensor) -> Tensor:
    """One float32 element at a multiple of 16 bytes: cuBLASLt refuses a scale elsewhere, such as one of a view."""
    scale = scale.reshape(1).float()
    return scale if scale.data_ptr() % 16 == 0 else scale.clone()


@functools.cache
def _native_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _padded(codes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous, at multiples of 16 bytes, with zeros after the last of K columns and N rows up to multiples of
    16 elements."""
    columns = -codes.shape[-1] % 16
    return _pad_fp8(codes, 0, columns), _pad_fp8(weight, -weight.shape[-2] % 16, columns)


def _pad_fp8(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Contiguous, at a multiple of 16 bytes, with zeros after the last rows and columns."""
    codes = codes.contiguous()
    if rows or columns:
        return F.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(torch.float8_e4m3fn)
    return codes if codes.data_ptr() % 16 == 0 else codes.clone()


def _bmm_fake(input, mat2, input_scale, weight_scale):
    dtype = torch.bfloat16 if input.dtype == torch.float8_e4m3fn else input.dtype
    return input.new_empty(input.shape[0], input.shape[1], mat2.shape[2], dtype=dtype)


@operator(fake=_bmm_fake)
def torch_quant_fp8_bmm(input: Tensor, mat2: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Batched matrix product on float8_e4m3fn codes: [B, M, K] x [B, K, N] * input_scale * weight_scale.

    Operands that are not e4m3 are quantised with their scale first. Returns [B, M, N] in input's dtype; bfloat16
    when input is already e4m3.
    """
    if input.dim() != 3 or mat2.dim() != 3 or input.shape[0] != mat2.shape[0] or input.shape[2] != mat2.shape[1]:
        raise ValueError(
            f"torch_quant_fp8_bmm: need [B, M, K] and [B, K, N], got {tuple(input.shape)} and {tuple(mat2.shape)}"
        )
    check_one_element("torch_quant_fp8_bmm", input_scale=input_scale, weight_scale=weight_scale)
    dtype = torch.bfloat16 if input.dtype == torch.float8_e4m3fn else input.dtype
    left, right = _codes(input, input_scale), _codes(mat2, weight_scale)
    if 0 in input.shape[:2] or not _native_fp8(input.device) or dtype == torch.float64:
        return (torch.bmm(left.float(), right.float()) * (input_scale.float() * weight_scale.float())).to(dtype)
    return _scaled_bmm(left, right.transpose(1, 2), input_scale, weight_scale, dtype)


def _codes(values: Tensor, scale: Tensor) -> Tensor:
    if not values.dtype.is_floating_point:
        raise TypeError(f"torch_quant_fp8_bmm: operands must be floating point, got {values.dtype}")
    return values if values.dtype == torch.float8_e4m3fn else e4m3_encode(values.float() / scale)


@operator(fake=linear_fake)
def torch_quant_nvfp4_linear(
    input: Tensor,
    weight_fp4: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    """Linear layer on NVFP4 operands (see quantization/nvfp4.py).

    input         [..., K], quantised here in blocks of 16 with the global scale `input_scale` = 2688 / amax
    weight_fp4    uint8 [N, K/2]; weight_scale: its swizzled e4m3 block scales, uint8 or e4m3
    alpha         1 / (input_scale * weight's global scale), one element
    Returns [..., N] in input's dtype: alpha * sum(code * block scale products) + bias, summed in float32.
    """
    name = "torch_quant_nvfp4_linear"
    if input_scale is None or weight_scale is None or alpha is None:
        raise ValueError(f"{name}: input_scale, weight_scale and alpha are all required")
    check_linear(name, input, bias, weight_fp4.shape[0])
    check_one_element(name, input_scale=input_scale, alpha=alpha)
    weight = nvfp4_weight(name, weight_fp4, weight_scale, input.shape[-1])
    rounded = round_nvfp4(input.reshape(-1, input.shape[-1]), input_scale.float())
    out = rounded @ weight.t() * alpha.float()
    out = out if bias is None else out + bias
    return out.to(input.dtype).view(*input.shape[:-1], weight_fp4.shape[0])


def nvfp4_weight(name: str, packed: Tensor, swizzled: Tensor, columns: int) -> Tensor:
    """Float32 [N, K] code * block scale of a packed weight with swizzled scales; named errors for what does not fit."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"{name}: the NVFP4 weight must be uint8, got {packed.dtype}")
    if swizzled.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise TypeError(f"{name}: block scales must be uint8 or float8_e4m3fn, got {swizzled.dtype}")
    if packed.dim() != 2 or packed.shape[1] * 2 != columns or columns % 16:
        raise ValueError(
            f"{name}: the NVFP4 weight must be [N, K/2], K = {columns} (a multiple of 16), got {tuple(packed.shape)}"
        )
    return dequantize_nvfp4(packed, unswizzle_scales(swizzled, packed.shape[0], columns // 16, name))
