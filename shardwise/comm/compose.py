"""Sums in fixed rank order, and collectives composed of simpler ones. Shared by the transports.

The order is always rank 0 first, then 1, 2, ...; 16-bit floats accumulate in float32 and are rounded once. So every
rank gets the same bits, whatever the size or the algorithm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SUMMABLE = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
)
HALVES = frozenset((torch.bfloat16, torch.float16))


def require_summable(dtype: torch.dtype, op: str) -> None:
    """TypeError for a dtype that no transport sums."""
    if dtype not in SUMMABLE:
        legal = ", ".join(sorted(str(d).removeprefix("torch.") for d in SUMMABLE))
        raise TypeError(f"{op}: cannot sum {dtype}; legal: {legal}; convert the tensor first")


def ordered_sum(parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """Sum of equal-shaped `parts` in their order, into `out`, which may be one of them."""
    if len(parts) == 1:
        return out.copy_(parts[0])
    if len(parts) == 2:  # torch adds two 16-bit floats in float32 and rounds once
        return torch.add(parts[0], parts[1], out=out)
    if out.dtype in HALVES:
        total = parts[0].float()
    else:
        total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return out.copy_(total)


def residual_rms_norm(
    reduced: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_bias: float,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(s) * (weight + weight_bias), s), s = reduced + residual. Without `residual_out` s overwrites `reduced`.

    Shapes [..., H], weight [H]. The norm is computed in float32 (of float64 in float64) from s as it is returned
    (rounded to its dtype).
    """
    total = reduced.add_(residual) if residual_out is None else torch.add(reduced, residual, out=residual_out)
    if weight.dtype == total.dtype and not weight_bias:
        normed = torch.nn.functional.rms_norm(total, weight.shape, weight, eps)
    else:
        wide = torch.promote_types(total.dtype, torch.float32)  # a 16-bit 1 + w would lose most of w
        gain = weight.to(wide) + weight_bias
        normed = torch.nn.functional.rms_norm(total.to(wide), gain.shape, gain, eps).to(total.dtype)
    return (normed if out is None else out.copy_(normed)), total


def check_norm_arguments(
    tensor: Tensor, residual: Tensor, weight: Tensor, out: Tensor | None = None, residual_out: Tensor | None = None
) -> None:
    """ValueError unless residual matches tensor [..., H], weight is [H], and results are contiguous and match."""
    shape, dtype, device = tensor.shape, tensor.dtype, tensor.device  # each look at a tensor takes 0.1 us
    for name, result in (("out", out), ("residual_out", residual_out)):
        if result is None:
            continue
        like = result.shape == shape and result.dtype == dtype and result.device == device
        if not like or not result.is_contiguous():
            raise ValueError(
                f"all_reduce_residual_rms_norm: {name} is {tuple(result.shape)} {result.dtype} on {result.device}, it "
                f"must be contiguous and like tensor: {tuple(shape)} {dtype} on {device}"
            )
    if residual.shape != shape or residual.dtype != dtype or residual.device != device:
        raise ValueError(
            f"all_reduce_residual_rms_norm: residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}, "
            f"it must be like tensor: {tuple(shape)} {dtype} on {device}"
        )
    if weight.shape != shape[-1:] or weight.device != device:
        raise ValueError(
            f"all_reduce_residual_rms_norm: weight is {tuple(weight.shape)} on {weight.device}, it must be [H] = "
            f"{tuple(shape[-1:])} on {device}"
        )
