"""Tiles by Hopper's tensor memory accelerator, and hints to the L2 cache."""

from typing import Any

from torch import Tensor

from shardwise.ops.triton_support import tl, triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None  # type: ignore[assignment,misc]  # its users need Triton

_PREFETCH = tl.constexpr("""
{
    prefetch.global.L2 [$1];
    mov.b32 $0, 0;
}
""")


def matrix_tiles(matrix: Tensor, rows: int, columns: int) -> Any:
    """Descriptor of a matrix [M, K] in tiles of `rows` x `columns`; address and rows are multiples of 16 bytes.

    What a tile holds beyond the matrix is zero.
    """
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@triton.jit
def prefetch(pointers, INTERPRET: tl.constexpr):
    """Bring the lines of 128 bytes at `pointers` to the L2 cache: a hint, for which nothing waits, also not memory."""
    if not INTERPRET:
        tl.inline_asm_elementwise(_PREFETCH, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
