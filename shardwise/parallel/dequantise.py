"""Weights that are stored with scales, as plain ones: FP8 (per tensor, channel or tile) and MXFP4."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.quantization.mxfp4 import dequantize_mxfp4
from shardwise.sharding.axes import Range


@dataclass(frozen=True)
class Scaled:
    """Where this rank's part of a weight and of its scales lie in the global tensors."""

    weight: tuple[tuple[Range, ...], ...]
    scale: tuple[tuple[Range, ...], ...]
    per: tuple[int, ...]
    """Weight elements that one scale element stands for, each dimension."""


def dequantise(weight: Tensor, scale: Tensor, place: Scaled, dtype: torch.dtype) -> Tensor:
    """The rank's weight [.., out, in] in `dtype`: float8 times its scales, or MXFP4 blocks [.., in / 32, 16]."""
    if weight.dtype == torch.uint8:
        return dequantize_mxfp4(weight, scale, dtype)
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"weights stored as {weight.dtype} with scales are not supported; supported: float8 and MXFP4")
    for dim, (inside, coarse, per) in enumerate(zip(place.weight, place.scale, place.per, strict=False)):
        if scale.dim() == weight.dim() and scale.shape[dim] != 1:
            scale = scale.index_select(dim, _scale_of_each(inside, coarse, per).to(scale.device))
    return (weight.float() * scale).to(dtype)


def _scale_of_each(inside: tuple[Range, ...], coarse: tuple[Range, ...], per: int) -> Tensor:
    """For each element of the rank's part, the local index of its scale."""
    elements, scales = _indices(inside), _indices(coarse)
    return torch.searchsorted(scales, elements // per)


def _indices(ranges: tuple[Range, ...]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])
