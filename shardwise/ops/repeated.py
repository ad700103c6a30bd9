"""Launches whose arguments are kept whole for addresses that come again.

A model's layers have weights and caches of their own, which stay, and its activations take a few places in turn. Where
a kernel takes many tensors, looking for their addresses among those of earlier calls costs the host less than putting
the arguments together.
"""

from collections.abc import Callable
from functools import partial

import torch

from shardwise.kernel_start import current_device
from shardwise.ops.kernel_launch import Kept, Launch, address_of, recorders
from shardwise.ops.triton_support import interpreting

MOST = 256
"""Sets of addresses for which arguments are kept, 1 KB each"""


class Repeated:
    """`launch` for one thread and stream, as `Scratch` keeps values: with the tensors of a call and, behind them, those
    that all its calls share. Its grid is not empty."""

    __slots__ = ("_index", "_launch", "_ready", "_shared")

    def __init__(self, device: torch.device, launch: Launch, shared: Kept):
        self._index, self._launch, self._shared = device.index, launch, shared
        self._ready: dict[tuple[int, ...], Callable[[], None]] = {}

    def __call__(self, pointers: tuple[torch.Tensor, ...]) -> None:
        """Run with the tensors `pointers`."""
        addresses = (*map(address_of, pointers),)
        start = self._ready.get(addresses)
        if start is None or recorders or self._index != current_device():
            return self._launch_anew(pointers, addresses)
        start()

    def _launch_anew(self, pointers: tuple[torch.Tensor, ...], addresses: tuple[int, ...]) -> None:
        form, grid, free = self._launch
        form(grid, pointers, free, self._shared)
        if interpreting():
            return
        every = (*addresses, *self._shared.addresses)
        (start, stream_of, rest), numbers = form.bound(every, free)
        if len(self._ready) >= MOST:
            self._ready.clear()
        self._ready[addresses] = partial(start, *grid, stream_of(self._index), *rest, *every, *numbers)
