"""How the elements of a call fall on rows: tokens when fused, equal stretches of the flat tensor when plain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

CHUNK_BYTES = 16


@dataclass(frozen=True)
class Rows:
    """How the elements of a call fall on rows."""

    count: int
    width: int
    total: int
    chunks: int
    lanes: int
    aligned: bool


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def are_aligned(tensors: Sequence[Tensor]) -> bool:
    return math.gcd(CHUNK_BYTES, *map(Tensor.data_ptr, tensors)) == CHUNK_BYTES


def plain_rows(total: int, itemsize: int, lanes: int, aligned: bool) -> Rows:
    """`aligned`: of the tensors' addresses."""
    per_chunk = CHUNK_BYTES // itemsize
    width = lanes * per_chunk
    return Rows(-(-total // width), width, total, lanes, lanes, aligned and total % per_chunk == 0)


def token_rows(total: int, hidden: int, itemsize: int, aligned: bool) -> Rows:
    chunks = -(-hidden * itemsize // CHUNK_BYTES)
    aligned = aligned and hidden * itemsize % CHUNK_BYTES == 0
    return Rows(total // hidden, hidden, total, chunks, max(32, _next_power_of_two(chunks)), aligned)
