"""Mixture of experts with NVFP4 weights and 16-bit activations, on the kernels of MXFP4: one k-step is one block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.moe.mxfp4 import PackedMixture, packed_moe
from shardwise.ops.moe.mxfp4_layout import TILE, PackedMXFP4, PackedOnce, join_bytes, pack_codes, row_order
from shardwise.ops.quantization.nvfp4 import swizzled_size, unswizzle_scales
from shardwise.ops.triton_support import interpreting

Weight = tuple[Tensor, Tensor, Tensor]
"""uint8 [E, N, K/2], swizzled block scales [E, ...], float32 [E] = 1 / weight's global scale."""


def nvfp4_moe(
    name: str,
    rows: Tensor,  # [T, H], contiguous
    ids: Tensor,  # int [T, K], local; others are skipped
    weights: Tensor,  # [T, K]
    first: Weight,
    second: Weight,
    act: str,
    on_input: bool,
) -> Tensor:
    """Routed sum [T, H] in rows' dtype; `act` "silu" (w3 rows, then w1 rows) or "relu2"."""
    up, down = packed_once(name, first, second, act)
    factors = first[2], second[2]
    x = rows if interpreting() else rows.to(torch.bfloat16)
    mixture = PackedMixture(up, down, act, factors=factors, on_input=on_input)
    return packed_moe(x, ids, weights, mixture).to(rows.dtype)


def pack_nvfp4(name: str, codes: Tensor, scales: Tensor, arrangement: str) -> PackedMXFP4:
    """Re-lay out codes uint8 [E, N, K/2] and their swizzled e4m3 block scales; no bias.

    arrangement as in `mxfp4_layout.row_order`. ValueError names scales of the wrong size.
    """
    experts, rows, half = codes.shape
    columns, padded = half * 2, -(-rows // TILE) * TILE
    if scales.shape[0] != experts or scales[0].numel() != swizzled_size(rows, columns // 16):
        raise ValueError(
            f"{name}: block scales of {experts} experts of {rows} x {columns} must be [E, ...] with "
            f"{swizzled_size(rows, columns // 16)} elements each (rows padded to 128, columns / 16 to 4), "
            f"got {tuple(scales.shape)}"
        )
    tiles_n, tiles_k = padded // TILE, -(-columns // TILE)
    order = row_order(rows, padded, arrangement, codes.device)
    words = torch.empty((experts, tiles_n, tiles_k, 4, 8, 4, 4), dtype=torch.int32, device=codes.device)
    packed = torch.empty((experts, tiles_n, tiles_k, 4, 8, 2), dtype=torch.int32, device=codes.device)
    for expert in range(experts):
        words[expert] = pack_codes(codes[expert], order, tiles_n, tiles_k)
        plain = unswizzle_scales(scales[expert], rows, columns // 16).view(torch.uint8)
        view = F.pad(plain, (0, tiles_k * 4 - columns // 16, 0, 1))[order].view(tiles_n, 4, 2, 8, tiles_k, 4)
        packed[expert] = join_bytes(view.permute(0, 4, 1, 3, 2, 5))
    bias = torch.zeros((experts, padded), dtype=torch.float32, device=codes.device)
    return PackedMXFP4(words, packed, bias, rows, columns, "nvfp4")


_PACKED: PackedOnce[PackedMXFP4] = PackedOnce()


def packed_once(name: str, first: Weight, second: Weight, act: str) -> tuple[PackedMXFP4, PackedMXFP4]:
    """`pack_nvfp4` of both products' weights, made at the first call."""

    def packed(codes: Tensor, scales: Tensor, arrangement: str) -> PackedMXFP4:
        return _PACKED.get((codes, scales), arrangement, lambda: pack_nvfp4(name, codes, scales, arrangement))

    return packed(*first[:2], "stacked" if act == "silu" else "plain"), packed(*second[:2], "plain")
