"""RMS norms of FlashInfer, called through its public functions."""

import functools
import os

import torch

from shardwise.ops.normalization.reference import add_norm_fake, check_add_norm, check_weight
from shardwise.ops.registry import FLASHINFER, operator
from shardwise.ops.vector_access import takes_vectors, with_vectors


@functools.cache
def _functions() -> tuple:
    from flashinfer.norm import fused_add_rmsnorm, rmsnorm

    return rmsnorm, fused_add_rmsnorm


@functools.cache
def _dependent_launch(device: torch.device) -> bool:
    """Programmatic dependent launch, on unless TRTLLM_ENABLE_PDL=0 when the first norm runs."""
    return os.environ.get("TRTLLM_ENABLE_PDL", "1") == "1" and torch.cuda.get_device_capability(device)[0] >= 9


def _check(name: str, input: torch.Tensor, weight: torch.Tensor) -> None:
    if input.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != input.dtype:
        raise TypeError(
            f"{name}: FlashInfer takes float16 or bfloat16 for input and weight, got {input.dtype} and {weight.dtype}; "
            "torch_rmsnorm takes any"
        )
    check_weight(name, "input", input, weight)


def _like(input, weight, eps):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@operator(fake=_like, needs=(FLASHINFER,), instead="torch_rmsnorm")
def flashinfer_rms_norm(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x²) + eps). input [..., H] float16 or bfloat16, weight [H] of the same dtype."""
    _check("flashinfer_rms_norm", input, weight)
    out = _like(input, weight, eps)
    if input.numel():
        size = input.shape[-1]
        rows, weight = with_vectors(input.reshape(-1, size)), with_vectors(weight)
        _functions()[0](rows, weight, eps, out=out.view(-1, size), enable_pdl=_dependent_launch(input.device))
    return out


@operator(
    fake=add_norm_fake, mutates=("x", "residual"), needs=(FLASHINFER,), instead="triton_fused_add_rms_norm_inplace"
)
def flashinfer_fused_add_rms_norm_inplace(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """residual += x, then x = rmsnorm(residual) * weight, both in place.

    x and residual [..., H] of one shape and dtype (float16 or bfloat16) that can be viewed as two dimensions, with
    rows that begin at multiples of 16 bytes where H is one.
    """
    name = "flashinfer_fused_add_rms_norm_inplace"
    check_add_norm(name, x, residual, weight)
    _check(name, x, weight)
    if x.numel() == 0:
        return
    rows, residual_rows = x.view(-1, x.shape[-1]), residual.view(-1, x.shape[-1])
    if not (takes_vectors(rows) and takes_vectors(residual_rows)):
        raise ValueError(
            f"{name}: rows of x and residual must be contiguous and aligned to vectors of 16 bytes, got strides "
            f"{x.stride()} and {residual.stride()}; triton_fused_add_rms_norm_inplace takes any alignment"
        )
    _functions()[1](rows, residual_rows, with_vectors(weight), eps, enable_pdl=_dependent_launch(x.device))


def flashinfer_fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised x, new residual): the in-place operator, returning what it wrote."""
    torch.ops.auto_deploy.flashinfer_fused_add_rms_norm_inplace(x, residual, weight, eps)
    return x, residual
