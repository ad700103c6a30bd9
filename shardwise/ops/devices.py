"""Where an operator's tensors lie: kernels get addresses, and one of another device would end the CUDA context."""

import torch


def one_device(op: str, *devices: torch.device) -> torch.device:
    """The device that all of `op`'s tensors lie on. ValueError where they differ."""
    first = devices[0]
    for device in devices:
        if device != first:
            raise ValueError(
                f"{op}: tensors lie on {first} and on {device}; legal: one device for all but those named *_host"
            )
    return first


def require_one_device(op: str, *tensors: torch.Tensor | None) -> None:
    """ValueError for tensors on different devices."""
    one_device(op, *[tensor.device for tensor in tensors if tensor is not None])
