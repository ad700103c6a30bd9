"""States of recurrent layers: what they keep of a sequence has one size, however long the sequence is.

A layer keeps the last inputs of its causal convolution, in the activations' dtype, and a recurrent state in float32,
which adds up over thousands of tokens. A sequence's states stand in its cache slot. They are zero when it begins: a
slot is cleared as its sequence leaves, and a prompt of several tokens does not read what stands there. A sequence that
gives up its place computes them again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateShape:
    """One layer's states of a sequence on this rank."""

    channels: int
    """C, of the convolution."""
    kernel: int
    """K, inputs that it sees."""
    recurrent: tuple[int, int, int]
    """[H, P, N] of Mamba-2, [H, K, V] of the delta rule."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of a sequence, as planned (`sharding/memory.py`)."""
        return self.channels * (self.kernel - 1) * dtype.itemsize + prod(self.recurrent) * torch.float32.itemsize


class LayerState(NamedTuple):
    """One layer's states of all slots."""

    conv: Tensor
    """[slots, C, K - 1] for kernels, [slots, C, K] for PyTorch's operators"""
    recurrent: Tensor
    """float32 [slots, H, ., .]"""


class StateSpans(Protocol):
    """What operators with states are told of a step's sequences; `Batch` has it."""

    @property
    def batch_info(self) -> Tensor: ...

    @property
    def seq_len(self) -> Tensor: ...

    @property
    def cu_seqlen(self) -> Tensor: ...

    @property
    def slots(self) -> Tensor: ...

    @property
    def resumes(self) -> Tensor: ...

    def pieces(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]: ...


class StateCache:
    """The states of `slots` sequences in every layer that has a shape here.

    kernels  whether kernels of a GPU read them, else PyTorch's operators do, which keep one more input
    """

    def __init__(
        self,
        shapes: Sequence[StateShape | None],
        *,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: bool,
    ):
        self.slots, self.kernels = slots, kernels
        self._layers: dict[int, LayerState] = {}
        self._stacks: list[Tensor] = []
        """[layers, slots, ...] of layers of one shape, so that few operations clear a slot."""
        for shape in dict.fromkeys(shape for shape in shapes if shape is not None):
            numbers = [number for number, other in enumerate(shapes) if other == shape]
            lead = len(numbers), slots
            conv = torch.zeros(*lead, shape.channels, shape.kernel - kernels, dtype=dtype, device=device)
            recurrent = torch.zeros(*lead, *shape.recurrent, dtype=torch.float32, device=device)
            self._stacks += conv, recurrent
            self._layers |= {number: LayerState(conv[i], recurrent[i]) for i, number in enumerate(numbers)}

    def __bool__(self) -> bool:
        """Whether some layer has states."""
        return bool(self._layers)

    def of(self, layer: int) -> LayerState:
        return self._layers[layer]

    def clear(self, slot: int) -> None:
        """The slot is ready for another sequence."""
        for stack in self._stacks:
            stack[:, slot] = 0

    def nbytes(self) -> int:
        return sum(stack.nbytes for stack in self._stacks)

    def describe(self) -> str:
        """What follows the description of a cache's pages or rows; empty where no layer has states."""
        if not self._layers:
            return ""
        return f", states of {self.slots} sequences, {self.nbytes() / self.slots / 2**20:.1f} MiB each"
