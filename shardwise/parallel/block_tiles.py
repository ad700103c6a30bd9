"""Products of many rows with 4-bit matrices: a tile of outputs at a time becomes bfloat16, for the library's product.

torch's kernel for 4-bit weights dequantises anew for every four rows and multiplies in float32, 85 GFLOP/s on a core of
an AMD EPYC (Zen 4); its bfloat16 products run at 200 there. To dequantise a matrix takes as long as 18 rows do.
"""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

FEWEST_ROWS = 64
"""From here on: 1.2 ms for 1.3 with 64 rows of 1536 x 576, 2.8 for 5.3 with 256, 10 for 21 with 1024."""
TILE = 2**19
"""Elements of a tile, 2 MiB in float32. With half as many a matrix takes 20 % longer, with more not less."""


class FourBit(Protocol):
    """A 4-bit matrix in the kernel's form: w = (code - 8) * scale + zero."""

    packed: Tensor
    """uint8 [out, in / 2]"""
    scales: Tensor
    """[in / group, out, 2]: scale and zero."""
    group: int
    """Weights of a row that share them."""


@cache
def panel_width() -> int | None:
    """Outputs of a panel, in which packed codes lie as [panels, in, two a byte], the low ones those of its first half.

    It depends on the processor, and is found by packing codes; None where their form is another one.
    """
    inputs = 32
    codes = torch.randint(0, 16, (64, inputs), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for width in (64, 32):
        low, high = codes.view(-1, 2, width // 2, inputs).transpose(2, 3).unbind(1)
        if torch.equal(packed.view(low.shape), (low | high << 4).to(torch.uint8)):
            return width
    return None


def pays(rows: int) -> bool:
    """Whether bfloat16 products of so many rows are worth to dequantise a matrix for, on this processor."""
    return rows >= FEWEST_ROWS and torch.cpu._is_avx512_bf16_supported()


def takes(rows: int, outputs: int) -> bool:
    """Whether `product` is there for a matrix of so many outputs, and faster than the kernel for so many rows."""
    return pays(rows) and (width := panel_width()) is not None and outputs % width == 0


def product(x: Tensor, planes: Sequence[FourBit]) -> Tensor:
    """bfloat16 x [T, in] times the sum of 4-bit matrices -> [T, out]."""
    inputs, outputs = x.shape[1], planes[0].scales.shape[1]
    out, width = x.new_empty(x.shape[0], outputs), panel_width()
    assert width is not None
    step = width * max(1, TILE // (inputs * width))
    for first in range(0, outputs, step):
        rows = slice(first, min(first + step, outputs))
        torch.mm(x, _tile(planes, rows, inputs, width), out=out[:, rows])
    return out


def _tile(planes: Sequence[FourBit], rows: slice, inputs: int, width: int) -> Tensor:
    """bfloat16 [in, rows]: the sum of some outputs' weights."""
    total, *others = (_dequantised(plane, rows, inputs, width) for plane in planes)
    for other in others:
        total += other
    return total.to(torch.bfloat16)


def _dequantised(plane: FourBit, rows: slice, inputs: int, width: int) -> Tensor:
    """float32 [in, rows]."""
    count = rows.stop - rows.start
    packed = plane.packed[rows].view(count // width, inputs, width // 2).transpose(0, 1)
    codes = torch.empty(inputs, count // width, 2, width // 2)
    codes[:, :, 0] = packed & 15
    codes[:, :, 1] = packed >> 4
    scale, zero = plane.scales[:, rows].float().permute(2, 0, 1).contiguous()[:, :, None]  # [in / group, 1, rows]
    by_group = codes.view(-1, plane.group, count)
    return torch.addcmul(zero - 8 * scale, by_group, scale, out=by_group).view(inputs, count)
