"""Tensors for foreign kernels that read rows in vectors of up to 16 bytes and do not look at addresses."""

import math

import torch


def takes_vectors(rows: torch.Tensor) -> bool:
    """Whether every row [..., H], contiguous in itself, begins where a vector may.

    A vector is the largest of 16, 8, 4, 2 bytes that divides a row's; a row that begins elsewhere is a misaligned
    access, which ends the CUDA context.
    """
    if rows.is_contiguous() and rows.data_ptr() % 16 == 0:
        return True
    item = rows.element_size()
    unit = math.gcd(16, rows.shape[-1] * item)
    begins = rows.data_ptr()
    for count, stride in zip(rows.shape[:-1], rows.stride()[:-1], strict=True):
        if count > 1:
            begins |= stride * item
    return begins % unit == 0 and (rows.stride(-1) == 1 or rows.shape[-1] <= 1)


def with_vectors(rows: torch.Tensor) -> torch.Tensor:
    """`rows`, or a contiguous copy where `takes_vectors` says no."""
    return rows if takes_vectors(rows) else rows.clone(memory_format=torch.contiguous_format)
