"""Quantised formats and the linear operators on them.

What a user packs weights with, each with its inverse; layouts and sources are in the modules' texts:

    mxfp4   quantize_mxfp4                          blocks of 32 with e8m0 scales, as gpt-oss checkpoints
    nvfp4   nvfp4_global_scale, quantize_nvfp4,     blocks of 16 with e4m3 scales and a scale of the whole tensor;
            swizzle_scales                          the scales in the order of the tensor cores
    fp8     quantize_fp8, quantize_fp8_blocks       e4m3 with one scale, or one for each 128 x 128
    int4    quantize_int4_awq, quantize_int4_gptq   signed pairs of rows; unsigned words of eight with zero points
"""

from shardwise.ops.quantization.fp8 import (
    dequantize_fp8,
    dequantize_fp8_blocks,
    fp8_scale,
    quantize_fp8,
    quantize_fp8_blocks,
)
from shardwise.ops.quantization.int4 import (
    dequantize_int4_awq,
    dequantize_int4_gptq,
    quantize_int4_awq,
    quantize_int4_gptq,
)
from shardwise.ops.quantization.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from shardwise.ops.quantization.nvfp4 import (
    dequantize_nvfp4,
    nvfp4_global_scale,
    quantize_nvfp4,
    swizzle_scales,
    unswizzle_scales,
)

__all__ = [
    "dequantize_fp8",
    "dequantize_fp8_blocks",
    "dequantize_int4_awq",
    "dequantize_int4_gptq",
    "dequantize_mxfp4",
    "dequantize_nvfp4",
    "fp8_scale",
    "nvfp4_global_scale",
    "quantize_fp8",
    "quantize_fp8_blocks",
    "quantize_int4_awq",
    "quantize_int4_gptq",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "swizzle_scales",
    "unswizzle_scales",
]
