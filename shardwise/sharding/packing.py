"""Several values in one stored element: packed integers and pairs of 4-bit floats."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packing:
    """How neighbours along one dim of a tensor share a stored element, in fields of `bits`."""

    bits: int
    fields: tuple[int, ...]
    """For each neighbour in turn its field, counted from the lowest bits."""
    dim: int = -1
    """That the neighbours lie along, counted from the last."""
    added: int = 0
    """What a code is meant to have on top of the field, modulo 2 ** bits: GPTQ stores zero points less one."""
    blocks: bool = False
    """The last dim is the elements of a block, the one before it counts blocks."""

    @property
    def count(self) -> int:
        """Values in an element."""
        return len(self.fields)


def in_words(bits: int, dim: int = -1, *, added: int = 0) -> Packing:
    """Integers in 32-bit words, the first in the lowest bits."""
    return Packing(bits, tuple(range(32 // bits)), dim, added)


AWQ_WORDS = Packing(4, (0, 4, 1, 5, 2, 6, 3, 7))
"""AWQ's GEMM form: from the lowest field on a word holds numbers 0 2 4 6 1 3 5 7 of its neighbours."""
PAIRS = Packing(4, (0, 1))
"""Two 4-bit floats a byte, the first in the lower half."""
PAIRS_IN_BLOCKS = Packing(4, (0, 1), blocks=True)
"""The same, the bytes of a block in a dim of their own."""
