"""Plans: what an operator or a collective works out from the layout of its tensors, cached for the next such call.

Checking arguments, finding the forms of kernels and cutting grids takes the host several times as long as the
launches. All of it follows from shapes, strides, dtypes and devices of the tensors and from a few numbers, which repeat
from layer to layer and from step to step. Nothing of a call's tensors is kept: neither memory nor addresses. What
kernels of one call write for one another may be, see `ops/scratch.py`.

Layouts are compared, views and new tensors are made by functions that PyTorch's own compiler calls at every run of
compiled code, since they cost little: on a CPU nine tensors are compared in 0.8 µs, where a dictionary's key of their
shapes, strides and dtypes takes 4, a view is made in 0.6 µs instead of 0.9, a tensor in 0.5 instead of 1.1 to 1.7.
"""

import math
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch._C._dynamo.guards import (  # type: ignore[attr-defined]
    TensorGuards,
    _empty_strided_cpu,
    _empty_strided_cuda,
    _reinterpret_tensor,
)

from shardwise.kernel_start import current_device

Tensors = tuple[torch.Tensor, ...]
Value = TypeVar("Value")
_deterministic = torch._C._get_deterministic_algorithms
CAPACITY = 4096
"""Plans of one operator; prompts come in many lengths."""
view: Callable[..., torch.Tensor] = _reinterpret_tensor
"""(tensor, sizes, strides, offset in elements = 0) -> the same memory as another tensor; nothing is checked,
gradients do not pass."""
View = tuple[tuple[int, ...], tuple[int, ...], int]
"""Sizes, strides and first element, for `view`"""


def allocator(
    sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, strides: tuple[int, ...] | None = None
) -> Callable[[], torch.Tensor]:
    """A function that returns a new uninitialised tensor at every call; contiguous without `strides`."""
    if strides is None:
        strides = tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))
    index, make_here = device.index, _empty_strided_cuda if device.type == "cuda" else _empty_strided_cpu

    def make() -> torch.Tensor:
        elsewhere = index is not None and index != current_device()
        if elsewhere or _deterministic():  # which may ask for memory that is filled
            return torch.empty_strided(sizes, strides, dtype=dtype, device=device)
        return make_here(sizes, strides, dtype)

    return make


def taken_as_given(taken: Tensors, given: Tensors) -> bool:
    """Whether no tensor was copied, so that what was found out for `taken` holds for `given`."""
    return all(a is b for a, b in zip(taken, given, strict=True))


class PlanCache(Generic[Value]):
    """Plans by a key and by the layout of tensors.

    The key holds what else a plan follows from; by it alone the layouts of one key are searched one after another, so
    it should tell steps of different sizes apart.
    """

    def __init__(self) -> None:
        self._plans: dict[Hashable, list[tuple[Callable[..., bool], Value]]] = {}
        self._count = 0

    def get(self, key: Hashable, tensors: Tensors) -> Value | None:
        """The plan for tensors of this layout."""
        for same, value in self._plans.get(key, ()):
            if same(*tensors):
                return value
        return None

    def keep(self, key: Hashable, tensors: Tensors, value: Value) -> Value:
        """Keep `value` for calls with tensors of this layout; not if a tensor is given twice, which never compares."""
        same = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # type: ignore
        if same(*tensors):
            if self._count >= CAPACITY:
                self.clear()
            self._count += 1
            self._plans.setdefault(key, []).append((same, value))
        return value

    def clear(self) -> None:
        """Forget all, as after a change of what plans follow from."""
        self._plans.clear()
        self._count = 0
