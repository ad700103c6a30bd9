"""What every checkpoint header comes down to: named tensors with shape, storage type and byte range. Free of torch.

A storage type is named as the file format names it: safetensors' `BF16`, GGUF's `Q4_1`. Block-quantised types hold
a fixed number of elements in a fixed number of bytes, always along the last dimension.
"""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import NamedTuple


class CheckpointError(ValueError):
    """A checkpoint cannot be read as what it claims to be; the text names the file and the field."""


class TensorEntry(NamedTuple):
    """One tensor as it lies in a file."""

    name: str
    """Name in the checkpoint's own convention."""
    shape: tuple[int, ...]
    """Row-major, slowest dimension first; of elements, also for packed types."""
    dtype: str
    """A key of STORAGE."""
    path: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


# Elements in a block and bytes that hold them; plain types are blocks of one element.
STORAGE: dict[str, tuple[int, int]] = {
    "F64": (1, 8),
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F8_E4M3": (1, 1),
    "F8_E5M2": (1, 1),
    "F8_E8M0": (1, 1),
    "I64": (1, 8),
    "I32": (1, 4),
    "I16": (1, 2),
    "I8": (1, 1),
    "U64": (1, 8),
    "U32": (1, 4),
    "U16": (1, 2),
    "U8": (1, 1),
    "BOOL": (1, 1),
    "C64": (1, 8),
    "F4": (2, 1),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110),
    "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136),
    "IQ1_M": (256, 56),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
}


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor of this shape; ValueError when its rows are not a whole number of blocks."""
    elements, size = STORAGE[dtype]
    last = shape[-1] if shape else 1
    if last % elements:
        raise ValueError(f"rows of {last} elements are not a whole number of {dtype} blocks of {elements}")
    return prod(shape) // elements * size


def check_ranges(entries: Iterable[TensorEntry], start: int, end: int) -> None:
    """Every byte range lies in `[start, end)` of its file and no two overlap, or CheckpointError."""
    reached, before = start, "the header"
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset + entry.nbytes > end:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name} needs bytes {entry.offset} to {entry.offset + entry.nbytes}, "
                f"but the file ends at {end}: it is truncated, fetch it again"
            )
        if entry.offset < reached:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name} begins at byte {entry.offset}, inside {before}, "
                f"which ends at {reached}"
            )
        if entry.nbytes:
            reached, before = entry.offset + entry.nbytes, f"tensor {entry.name}"
