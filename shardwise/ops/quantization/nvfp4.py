"""NVFP4: e2m1 codes in blocks of 16 along K, one e4m3 scale a block and one float32 scale a tensor.

`global_scale` g = 448 * 6 / amax; block scale = e4m3(block_amax / 6 * g); value = code * block_scale / g.
Block scales are stored swizzled for the tensor cores: the matrix [M, K/16], zero padded to multiples of 128 x 4, is
viewed as [M/128, 4, 32, K/64, 4] and permuted (0, 3, 2, 1, 4).

Sources: NVIDIA cuBLAS documentation, section "1D Block Scaling Factors Layout"; OCP MX v1.0 for e2m1.
"""

import torch
from torch import Tensor

from shardwise.ops.quantization.floats import (
    E2M1_MAX,
    E4M3_MAX,
    e2m1_decode,
    e2m1_encode,
    e2m1_pack,
    e2m1_round,
    e2m1_unpack,
    e4m3_encode,
)

BLOCK = 16
RANGE = E2M1_MAX * E4M3_MAX


def nvfp4_global_scale(values: Tensor) -> Tensor:
    """448 * 6 / amax as a float32 scalar; 1 for a tensor of zeros."""
    amax = values.abs().amax().float()
    return torch.where(amax > 0, RANGE / amax, torch.ones_like(amax))


def quantize_nvfp4(values: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`values` [..., K], K a multiple of 16, to (packed uint8 [..., K/2], scales float8_e4m3fn [..., K/16]).

    A block whose scale rounds to zero is stored with scale 1, so that its codes stay finite (they are zeros).
    """
    scaled, scales = _scaled("quantize_nvfp4", values, global_scale)
    return e2m1_pack(e2m1_encode(scaled).flatten(-2)), scales.squeeze(-1).to(torch.float8_e4m3fn)


def round_nvfp4(values: Tensor, global_scale: Tensor) -> Tensor:
    """Float32 code * block scale [..., K] of `quantize_nvfp4`, without its codes, to be divided by `global_scale`."""
    scaled, scales = _scaled("round_nvfp4", values, global_scale)
    return (e2m1_round(scaled) * scales).flatten(-2)


def _scaled(caller: str, values: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(what is to become codes [..., K/16, 16], block scales [..., K/16, 1]), both float32."""
    if values.shape[-1] % BLOCK:
        raise ValueError(f"{caller}: last dimension {values.shape[-1]} is not a multiple of the block of {BLOCK}")
    grouped = values.float().unflatten(-1, (-1, BLOCK))
    scales = e4m3_encode(grouped.abs().amax(dim=-1, keepdim=True) / E2M1_MAX * global_scale).float()
    scales = scales.masked_fill(scales == 0, 1.0)
    return grouped * (global_scale / scales), scales


def dequantize_nvfp4(packed: Tensor, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """Float32 values [..., K] of (packed uint8 [..., K/2], scales e4m3 [..., K/16]), plain (not swizzled) scales.

    Without `global_scale` the result is code * block_scale, to be divided by it later.
    """
    if packed.dtype != torch.uint8 or scales.dtype != torch.float8_e4m3fn:
        raise TypeError(
            f"dequantize_nvfp4: need uint8 codes and float8_e4m3fn scales, got {packed.dtype} and {scales.dtype}"
        )
    if packed.shape[:-1] != scales.shape[:-1] or packed.shape[-1] * 2 != scales.shape[-1] * BLOCK:
        raise ValueError(
            f"dequantize_nvfp4: codes {tuple(packed.shape)} and scales {tuple(scales.shape)} do not belong together; "
            f"need [..., K/2] and [..., K/{BLOCK}]"
        )
    values = e2m1_decode(e2m1_unpack(packed)).unflatten(-1, (-1, BLOCK)) * scales.float()[..., None]
    values = values.flatten(-2)
    return values if global_scale is None else values / global_scale


def swizzled_size(rows: int, blocks: int) -> int:
    """Elements of the swizzled scales of a matrix with `rows` rows and `blocks` blocks a row."""
    return -(-rows // 128) * 128 * -(-blocks // 4) * 4


def swizzle_scales(scales: Tensor) -> Tensor:
    """e4m3 or uint8 [M, K/16] to uint8 [swizzled_size(M, K/16)]."""
    rows, blocks = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -blocks % 4, 0, -rows % 128))
    return padded.view(-(-rows // 128), 4, 32, -(-blocks // 4), 4).permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle_scales(swizzled: Tensor, rows: int, blocks: int, caller: str = "unswizzle_scales") -> Tensor:
    """Inverse of `swizzle_scales`: float8_e4m3fn [rows, blocks]. ValueError names a wrong number of elements."""
    if swizzled.numel() != swizzled_size(rows, blocks):
        raise ValueError(
            f"{caller}: swizzled block scales of a matrix with {rows} rows and {blocks} blocks a row have "
            f"{swizzled_size(rows, blocks)} elements (rows padded to 128, blocks to 4), got {swizzled.numel()}"
        )
    tiles = swizzled.view(torch.uint8).reshape(-(-rows // 128), -(-blocks // 4), 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)
    return plain[:rows, :blocks].contiguous().view(torch.float8_e4m3fn)
