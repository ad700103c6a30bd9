"""Weights that are stored with scales, as plain ones: FP8 (per tensor, channel or tile) and MXFP4."""

from collections.abc import Callable
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
    """The rank's weight [.., out, in] in `dtype`: float8 times its scales, or MXFP4 blocks [.., in / 32, 16].

    Stacked experts are taken one after the other: what is wider than `dtype` on the way exists for one of them.
    """
    if weight.dtype == torch.uint8:
        return _one_by_one(lambda w, s: dequantize_mxfp4(w, s, dtype), weight, scale, stacked=weight.dim() == 4)
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"weights stored as {weight.dtype} with scales are not supported; supported: float8 and MXFP4")
    for dim, (inside, coarse, per) in enumerate(zip(place.weight, place.scale, place.per, strict=False)):
        if scale.dim() == weight.dim() and scale.shape[dim] != 1:
            scale = scale.index_select(dim, _scale_of_each(inside, coarse, per).to(scale.device))
    stacked = weight.dim() == scale.dim() == 3 and scale.shape[0] == weight.shape[0]
    return _one_by_one(lambda w, s: (w.float() * s).to(dtype), weight, scale, stacked=stacked)


def _one_by_one(change: Callable[[Tensor, Tensor], Tensor], weight: Tensor, scale: Tensor, *, stacked: bool) -> Tensor:
    if not stacked or not weight.shape[0]:
        return change(weight, scale)
    first = change(weight[0], scale[0])
    out = first.new_empty(weight.shape[0], *first.shape)
    out[0] = first
    for place in range(1, weight.shape[0]):
        out[place] = change(weight[place], scale[place])
    return out


def _scale_of_each(inside: tuple[Range, ...], coarse: tuple[Range, ...], per: int) -> Tensor:
    """For each element of the rank's part, the local index of its scale."""
    elements, scales = _indices(inside), _indices(coarse)
    return torch.searchsorted(scales, elements // per)


def _indices(ranges: tuple[Range, ...]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])
