"""Weights that stay float8 (e4m3) beside their scales, and how they become plain ones where no kernel takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.triton_support import interpreting, tl, triton

TILE = 128
"""Rows and columns of the weights that one scale stands for, as DeepSeek-V3 and Qwen3 publish them."""
COLUMNS = 16
"""Kernels take rows of a multiple of so many columns: what a thread loads at once."""


@dataclass(frozen=True, eq=False)
class Float8Weight:
    """value = code * scale.

    codes   e4m3 [.., N, K], contiguous
    scales  float32 [.., ceil(N / TILE), ceil(K / TILE)] of tiles, or [.., N] of output channels
    ValueError for other shapes or types.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self):
        *lead, rows, columns = self.codes.shape
        legal = ((*lead, -(-rows // TILE), -(-columns // TILE)), (*lead, rows))
        if self.codes.dtype != torch.float8_e4m3fn or self.scales.dtype != torch.float32:
            raise ValueError(
                f"float8 weights are e4m3 with float32 scales, got {self.codes.dtype}, {self.scales.dtype}"
            )
        if tuple(self.scales.shape) not in legal or columns % COLUMNS:
            raise ValueError(
                f"float8 weights {tuple(self.codes.shape)} need a multiple of {COLUMNS} columns and scales of shape "
                f"{' or '.join(map(str, legal))}, got {tuple(self.scales.shape)}"
            )
        if not (self.codes.is_contiguous() and self.scales.is_contiguous()):
            raise ValueError("float8 weights and their scales must be contiguous")

    @property
    def tiled(self) -> bool:
        """One scale a tile; else one an output channel."""
        return self.scales.dim() == self.codes.dim()

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def words(self) -> Tensor:
        """int32 [.., N, K / 4], a view: four codes each, the first in the lowest byte."""
        return self.codes.view(torch.int32)

    def widened(self, out: Tensor) -> Tensor:
        """The weights [N, K], of two dimensions, as plain ones: written into `out`, in its dtype, and returned."""
        rows, columns = self.codes.shape
        block = 1024 if interpreting() else 4096
        _widen[(rows, triton.cdiv(columns, block))](
            self.codes, self.scales, out, columns, TILED=self.tiled, TILE=TILE, BLOCK=block, num_warps=8
        )  # fmt: skip
        return out


@triton.jit
def _widen(code_ptr, scale_ptr, out_ptr, columns, TILED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    if TILED:
        scale = tl.load(scale_ptr + row // TILE * tl.cdiv(columns, TILE) + column // TILE, mask=inside, other=0.0)
    else:
        scale = tl.load(scale_ptr + row)
    at = row.to(tl.int64) * columns + column
    codes = tl.load(code_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (codes * scale).to(out_ptr.dtype.element_ty), mask=inside)
