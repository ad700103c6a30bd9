"""RMS norms of FlashInfer, called through its public functions."""

import os

import torch

from shardwise.ops.registry import FLASHINFER, operator


def _dependent_launch() -> bool:
    """Programmatic dependent launch, on unless TRTLLM_ENABLE_PDL=0."""
    return os.environ.get("TRTLLM_ENABLE_PDL", "1") == "1" and torch.cuda.get_device_capability()[0] >= 9


def _half(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: FlashInfer takes float16 and bfloat16, got {tensor.dtype}; torch_rmsnorm takes any")


def _like(input, weight, eps):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@operator(fake=_like, needs=(FLASHINFER,), instead="torch_rmsnorm")
def flashinfer_rms_norm(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x²) + eps). input [..., H] float16 or bfloat16, weight [H] of the same dtype."""
    from flashinfer.norm import rmsnorm

    _half("flashinfer_rms_norm", input)
    if input.numel() == 0:
        return _like(input, weight, eps)
    flat = input.reshape(-1, input.shape[-1])
    return rmsnorm(flat, weight, eps, enable_pdl=_dependent_launch()).view(input.shape)


def _nothing(x, residual, weight, eps):
    return None


@operator(fake=_nothing, mutates=("x", "residual"), needs=(FLASHINFER,))
def flashinfer_fused_add_rms_norm_inplace(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """residual += x, then x = rmsnorm(residual) * weight, both in place.

    x and residual [..., H] of one shape and dtype (float16 or bfloat16) that can be viewed as two dimensions.
    """
    from flashinfer.norm import fused_add_rmsnorm

    _half("flashinfer_fused_add_rms_norm_inplace", x)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            "flashinfer_fused_add_rms_norm_inplace: x and residual must agree, got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(residual.shape)} {residual.dtype}"
        )
    if x.numel():
        size = x.shape[-1]
        fused_add_rmsnorm(x.view(-1, size), residual.view(-1, size), weight, eps, enable_pdl=_dependent_launch())


def flashinfer_fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised x, new residual): the in-place operator, returning what it wrote."""
    torch.ops.auto_deploy.flashinfer_fused_add_rms_norm_inplace(x, residual, weight, eps)
    return x, residual
