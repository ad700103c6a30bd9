"""FP8 (float8_e4m3fn): one scale a tensor, or one a block of 128 x 128. value = code * scale, scale = amax / 448.

Sources: OCP 8-bit Floating Point Specification v1.0; block scales as DeepSeek-V3 publishes its weights
(arXiv:2412.19437, section 3.3.2).
"""

import torch
from torch import Tensor

from shardwise.ops.quantization.floats import E4M3_MAX, e4m3_encode

BLOCK = 128


def fp8_scale(values: Tensor) -> Tensor:
    """amax / 448 as a float32 scalar; 1 for a tensor of zeros."""
    amax = values.abs().amax().float()
    return torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))


def quantize_fp8(values: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes float8_e4m3fn, scale): clamp(values / scale, -448, 448); the scale of the whole tensor by default."""
    scale = fp8_scale(values) if scale is None else scale
    return e4m3_encode(values.float() / scale), scale


def dequantize_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """codes * scale, computed in float32."""
    return (codes.float() * scale).to(dtype)


def quantize_fp8_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] to (codes float8_e4m3fn [N, K], scales float32 [ceil(N/128), ceil(K/128)])."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [N/b, b, K/b, b]
    amax = tiles.abs().amax(dim=(1, 3))
    scales = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    return e4m3_encode(values.float() / _spread(scales, rows, columns)), scales


def dequantize_fp8_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Inverse of `quantize_fp8_blocks`. ValueError unless `scales` is [ceil(N/128), ceil(K/128)]."""
    rows, columns = codes.shape
    expected = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"dequantize_fp8_blocks: {rows} x {columns} codes in blocks of {BLOCK} have scales {expected}, "
            f"got {tuple(scales.shape)}"
        )
    return (codes.float() * _spread(scales, rows, columns)).to(dtype)


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
