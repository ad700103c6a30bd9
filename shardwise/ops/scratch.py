"""Memory that a planned call writes between its kernels, kept from call to call; `workspace.py` is for calls without a
plan, and costs the host some microseconds."""

import functools
from collections.abc import Callable
from threading import get_ident
from typing import Generic, TypeVar

import torch

from shardwise.kernel_start import raw_stream
from shardwise.plan_cache import allocator

Value = TypeVar("Value")
KEPT_TOKENS = 64
"""Calls of more tokens allocate anew, since their kernels take longer than the host."""
capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)


class Scratch(Generic[Value]):
    """Uninitialised tensors for calls of one layout, of which views may be part.

    Calls of one thread on one stream follow one another and share them; where a graph is captured, whose replays
    follow nothing, each call has its own.
    """

    def __init__(self, device: torch.device, tokens: int, make: Callable[[], Value]):
        self._index, self._make = device.index, make
        self._stream_of = raw_stream() if device.type == "cuda" and tokens <= KEPT_TOKENS else None
        self._kept: dict[tuple[int, int], Value] = {}  # by thread and stream

    def take(self) -> Value:
        """The tensors for a call on the current stream."""
        if self._stream_of is None:
            return self._make()
        stream = self._stream_of(self._index)
        if stream and capturing():  # nothing can be captured on the default stream, which is 0
            return self._make()
        owner = get_ident(), stream
        kept = self._kept.get(owner)
        if kept is None:
            kept = self._kept[owner] = self._make()
        return kept


@functools.cache
def shared(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Scratch[torch.Tensor]:
    """Memory of these sizes for calls of up to KEPT_TOKENS tokens, whatever their layouts and operators."""
    return Scratch(device, KEPT_TOKENS, allocator(sizes, dtype, device))
