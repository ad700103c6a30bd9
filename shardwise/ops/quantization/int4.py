"""INT4 weights in two layouts.

AWQ as ModelOpt exports it: uint8 [N/2, K], byte [i, k] holds output rows 2i (low nibble) and 2i + 1, signed 4 bit,
scales [N, K/block]; activations are multiplied with a pre-quantisation scale (arXiv:2306.00978).
GPTQ: int32 [K/8, N], nibble j of row r is input row 8r + j, unsigned, scales [G, N], zeros int32 [G, N/8] with nibble
j of column c for output 8c + j (arXiv:2210.17323; layout of AutoGPTQ without act-order, zeros used as stored).
"""

import torch
from torch import Tensor

AWQ_BLOCK = 128


def quantize_int4_awq(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] to (packed uint8 [N/2, K], scales float32 [N, K/128]), scale = block amax / 7."""
    rows, columns = weight.shape
    if rows % 2 or columns % AWQ_BLOCK:
        raise ValueError(f"quantize_int4_awq: need an even N and K a multiple of {AWQ_BLOCK}, got {rows} x {columns}")
    grouped = weight.float().unflatten(1, (-1, AWQ_BLOCK))
    amax = grouped.abs().amax(dim=-1)
    scales = torch.where(amax > 0, amax / 7, torch.ones_like(amax))
    codes = (grouped / scales[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int16)
    return ((codes[0::2] & 0xF) | ((codes[1::2] & 0xF) << 4)).to(torch.uint8), scales


def dequantize_int4_awq(packed: Tensor, scales: Tensor, caller: str = "dequantize_int4_awq") -> Tensor:
    """Float32 [N, K]. ValueError unless `scales` is [N, G] with K a multiple of G."""
    rows, columns = packed.shape[0] * 2, packed.shape[1]
    if scales.dim() != 2 or scales.shape[0] != rows or not scales.shape[1] or columns % scales.shape[1]:
        raise ValueError(
            f"{caller}: int4 weight {tuple(packed.shape)} (N = {rows}, K = {columns}) needs scales [N, K/block], "
            f"got {tuple(scales.shape)}"
        )
    codes = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten(0, 1).to(torch.int8)
    signed = torch.where(codes > 7, codes - 16, codes).float()
    return signed * scales.float().repeat_interleave(columns // scales.shape[1], dim=1)


def quantize_int4_gptq(weight: Tensor, group: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` [K, N] to (qweight int32 [K/8, N], scales float32 [K/group, N], qzeros int32 [K/group, N/8])."""
    rows, columns = weight.shape
    if rows % group or rows % 8 or columns % 8:
        raise ValueError(f"quantize_int4_gptq: need K a multiple of 8 and {group}, N of 8, got {rows} x {columns}")
    grouped = weight.float().unflatten(0, (-1, group))
    low, high = grouped.amin(dim=1).clamp(max=0), grouped.amax(dim=1).clamp(min=0)
    scales = torch.where(high > low, (high - low) / 15, torch.ones_like(high))
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (grouped / scales[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
    return _pack_nibbles(codes, dim=0), scales, _pack_nibbles(zeros, dim=1)


def dequantize_int4_gptq(
    qweight: Tensor, scales: Tensor, qzeros: Tensor, caller: str = "dequantize_int4_gptq"
) -> Tensor:
    """Float32 [K, N]: scales * (codes - zeros). TypeError unless words are int32, ValueError for shapes that do not
    belong together."""
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
        raise TypeError(f"{caller}: qweight and qzeros must be int32, got {qweight.dtype} and {qzeros.dtype}")
    rows, columns = qweight.shape[0] * 8, qweight.shape[1]
    groups = scales.shape[0]
    matching = scales.shape == (groups, columns) and qzeros.shape == (groups, columns // 8)
    if not matching or not groups or rows % groups:
        raise ValueError(
            f"{caller}: qweight {tuple(qweight.shape)} (K = {rows}, N = {columns}) needs scales [G, N] and qzeros "
            f"[G, N/8], got {tuple(scales.shape)} and {tuple(qzeros.shape)}"
        )
    codes = _unpack_nibbles(qweight, dim=0).float().unflatten(0, (groups, -1))
    zeros = _unpack_nibbles(qzeros, dim=1).float()
    return ((codes - zeros[:, None]) * scales.float()[:, None]).flatten(0, 1)


def _pack_nibbles(codes: Tensor, dim: int) -> Tensor:
    """Eight values along `dim` to one int32, the first in the lowest nibble."""
    nibbles = codes.to(torch.int64).unflatten(dim, (-1, 8))
    shape = [1] * nibbles.dim()
    shape[dim + 1] = 8
    shifts = (4 * torch.arange(8, device=codes.device)).view(shape)
    word = (nibbles << shifts).sum(dim + 1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _unpack_nibbles(words: Tensor, dim: int) -> Tensor:
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = 8
    shifts = (4 * torch.arange(8, device=words.device)).view(shape)
    return ((words.unsqueeze(dim + 1) >> shifts) & 0xF).flatten(dim, dim + 1)
