"""What numbers an operator computes with: an integer result would be cut off without a word."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(op: str, name: str, tensor: torch.Tensor) -> None:
    """TypeError unless the argument `name` of operator `op` holds floats of 16 bits or more."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; legal: float16, bfloat16, float32, float64")


def check_cache(op: str, name: str, cache: torch.Tensor) -> None:
    """TypeError unless the cache `name` of operator `op` holds floats, of 8 bits or more."""
    if not cache.is_floating_point():
        raise TypeError(f"{op}: {name} is {cache.dtype}; legal: floating point, 8 bits and more")
