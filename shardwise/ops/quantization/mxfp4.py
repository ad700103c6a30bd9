"""MXFP4: e2m1 codes in blocks of 32 along the last dimension, one e8m0 scale a block.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.2 and 6.3. The tensors are laid out as in the
gpt-oss checkpoints: blocks uint8 [..., K/32, 16] (low nibble first along K), scales uint8 [..., K/32].
"""

import torch
from torch import Tensor

from shardwise.ops.quantization.floats import (
    E8M0_BIAS,
    e2m1_decode,
    e2m1_encode,
    e2m1_pack,
    e2m1_unpack,
    e8m0_decode,
    e8m0_encode,
)

BLOCK = 32
_EMAX = 2  # exponent of e2m1's largest power of two


def quantize_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` [..., K], K a multiple of 32, to (blocks, scales).

    The shared exponent is floor(log2(amax)) - 2, so the largest element may saturate at 6 (up to 7.99 before
    rounding), as the specification's conversion does. A block that holds NaN or infinity gets the NaN scale.
    """
    if values.shape[-1] % BLOCK:
        raise ValueError(f"quantize_mxfp4: last dimension {values.shape[-1]} is not a multiple of the block of {BLOCK}")
    grouped = values.double().unflatten(-1, (-1, BLOCK))
    power = e8m0_encode(grouped.abs().amax(dim=-1))
    finite = power != 255
    scales = torch.where(finite, (power.to(torch.int16) - _EMAX).clamp(min=0), power.to(torch.int16)).to(torch.uint8)
    scaled = torch.ldexp(grouped, E8M0_BIAS - scales.to(torch.int32)[..., None])
    return e2m1_pack(e2m1_encode(scaled)), scales


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(blocks uint8 [..., K/32, 16], scales uint8 [..., K/32]) to values [..., K].

    Exact in bfloat16, float32 and float64 as long as the value is in range; a NaN scale makes its block NaN.
    Raises TypeError unless both are uint8, ValueError unless the shapes belong together.
    """
    check_mxfp4("dequantize_mxfp4", blocks, scales)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = e2m1_decode(e2m1_unpack(blocks), exact) * e8m0_decode(scales, exact)[..., None]
    return values.flatten(-2).to(dtype)


def check_mxfp4(caller: str, blocks: Tensor, scales: Tensor) -> None:
    """TypeError or ValueError unless the pair has MXFP4's dtypes and shapes."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise TypeError(f"{caller}: blocks and scales must be uint8, got {blocks.dtype} and {scales.dtype}")
    if blocks.dim() < 2 or blocks.shape[-1] != BLOCK // 2 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"{caller}: blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} do not belong together; "
            f"need [..., K/{BLOCK}, {BLOCK // 2}] and [..., K/{BLOCK}]"
        )
