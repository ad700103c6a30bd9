"""Weights that stay 4-bit integers in groups, in the order in which the matrix unit takes them.

A tile is a slab of 16 rows x TILE columns: int32 words [8 rows, 4 lanes, TILE / 16 steps] of eight codes, so that a
lane of a warp finds its part of the fragments of all steps in neighbouring words. A word holds four neighbouring
columns of rows r and r + 8: bits 4 h + 8 c + 16 p are the beginning of row r + 8 h, column 2 c + p. Of 32 columns each
lane has eight neighbours, in two steps: tokens need no other order.

Beside them lie words of a row and a group: the 16 bits of the scale, and above them the zero point.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.triton_support import tl, triton

SLAB = 16
GROUPS = (128, 64, 32)
"""Columns that may share a scale and a zero point."""
WIDE = 128
"""Columns of a slab that a program turns into plain ones."""
SCALES = (torch.float16, torch.bfloat16)


def tile_columns(group: int) -> int:
    """TILE: at most 64, as a tile's columns share a scale."""
    return min(group, 64)


def held_bytes(rows: int, columns: int, group: int) -> int:
    """What an `Int4Weight` of this shape takes."""
    slabs, tile = -(-rows // SLAB), tile_columns(group)
    return slabs * SLAB * (-(-columns // tile) * tile // 2 + 4 * -(-columns // group))


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """value = (code - zero) * scale, [N, K]; rows and columns beyond have scales of zero.

    words        int32 [ceil(N / 16), ceil(K / TILE), 8, 4, TILE / 16]
    scales       int32 [ceil(N / 16), ceil(K / group), 16]
    shape        (N, K)
    group        columns that share a scale and a zero point, one of GROUPS
    scale_dtype  one of SCALES
    """

    words: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group: int
    scale_dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    def widened(self, out: Tensor) -> Tensor:
        """The weight [N, K] as a plain one: written into `out`, in its dtype, and returned."""
        columns = self.shape[1]
        _widen[(self.words.shape[0], triton.cdiv(columns, WIDE))](
            self.words, self.scales, out, *self.shape, self.words.shape[1], self.scales.shape[1],
            TILE=tile_columns(self.group), GROUP=self.group, HALF=self.scale_dtype == torch.float16, BLOCK=WIDE,
        )  # fmt: skip
        return out


@dataclass(frozen=True, eq=False)
class Int4Stack:
    """Weights of as many rows, whole slabs of them: those of experts, one under the other in one `Int4Weight`."""

    weight: Int4Weight
    matrices: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)"""
        rows, columns = self.weight.shape
        return self.matrices, rows // self.matrices, columns

    @property
    def words(self) -> Tensor:
        return self.weight.words

    def widened(self, out: Tensor) -> Tensor:
        """[E, N, K], as of `Int4Weight`."""
        return self.weight.widened(out.view(self.weight.shape)).view(self.shape)


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor) -> Int4Weight:
    """codes uint8 [N, K] in 0..15, scales of SCALES [N, G] and zeros uint8 [N, G] in 0..15, on any device.

    ValueError for scales of another type, or groups of a length that is not among GROUPS.
    """
    (rows, columns), groups = codes.shape, scales.shape[1]
    group = columns // max(1, groups)
    if group not in GROUPS or group * groups != columns or scales.dtype not in SCALES:
        raise ValueError(
            f"4-bit weights of {columns} columns in {groups} groups with scales of {scales.dtype}: groups of "
            f"{', '.join(map(str, GROUPS))} columns and scales of 16 bits are legal"
        )
    tile, beyond = tile_columns(group), -rows % SLAB
    padded = F.pad(codes, (0, 0, 0, beyond))
    # slab, row half, row, tile, half of 4 steps, lane, step, k-half, pair
    fields = padded.view(-1, 2, 8, columns // tile, tile // 32, 4, 2, 2, 2).permute(0, 3, 2, 5, 4, 6, 7, 1, 8)
    shape = (*fields.shape[:4], tile // 16)
    words = torch.zeros(fields.shape[:6], dtype=torch.int32, device=codes.device)
    for half in range(2):
        for low in range(2):
            for pair in range(2):
                words |= fields[..., half, low, pair].int() << (8 * half + 4 * low + 16 * pair)
    bits = F.pad(scales, (0, 0, 0, beyond)).contiguous().view(torch.int16).int() & 0xFFFF
    beside = bits | F.pad(zeros, (0, 0, 0, beyond)).int() << 16
    beside = beside.view(-1, SLAB, groups).transpose(1, 2).contiguous()
    return Int4Weight(words.view(shape), beside, (rows, columns), group, scales.dtype)


@triton.jit
def scale_of(word, HALF: tl.constexpr):
    """float32, of words of a row and a group. HALF: it is float16, else bfloat16."""
    if HALF:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _widen(
    word_ptr, scale_ptr, out_ptr, rows, columns, tiles, groups,
    TILE: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a slab."""
    slab = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 16)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (slab * 16 + row < rows) & (column < columns)
    place = column % TILE
    step = place // 32 * 2 + place % 8 // 4
    at = ((slab * tiles + column // TILE) * 32 + row % 8 * 4 + place % 32 // 8) * (TILE // 16) + step
    word = tl.load(word_ptr + at, mask=inside, other=0)
    code = word >> (column % 4 // 2 * 8 + row // 8 * 4 + column % 2 * 16) & 15
    beside = tl.load(scale_ptr + (slab * groups + column // GROUP) * 16 + row, mask=inside, other=0)
    value = (code - (beside >> 16)).to(tl.float32) * scale_of(beside, HALF)
    tl.store(out_ptr + (slab * 16 + row) * columns + column, value.to(out_ptr.dtype.element_ty), mask=inside)
