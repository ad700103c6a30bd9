"""The order of calls on several streams: each waits for the calls before it, of its group and of its thread.

A group's memory serves one call at a time, and calls of two groups at the same time could each hold multiprocessors
that the other needs on another rank. NCCL's kernels wait for other ranks too, so its calls count.
"""

import threading
from typing import TYPE_CHECKING, NamedTuple

import torch

from shardwise.comm import watch
from shardwise.comm.base import CommError

if TYPE_CHECKING:
    from shardwise.comm.p2p.communicator import P2PCommunicator


class _Used(NamedTuple):
    """A stream, which takes long to ask for, and its handle."""

    handle: int | None = None
    stream: torch.cuda.Stream | None = None


_NEVER = _Used()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.last: dict[int, _Used] = {}
        """By device: where this thread's last call went, of whichever group."""


_thread = _Thread()


class StreamOrder:
    """Of one group's calls. On a CPU there is nothing to order."""

    def __init__(self, device: torch.device):
        self._device = device.index if device.type == "cuda" else None
        self._last = _NEVER

    def take(self) -> None:
        """Let the current stream wait for the last calls of this group, and of this thread on this device.

        While a graph is being captured nothing is known about when it will run, so nothing is done.
        """
        if self._device is None:
            return
        handle = torch._C._cuda_getCurrentRawStream(self._device)  # each call asks: a Stream takes 2 us to make
        last = self._last, _thread.last.get(self._device, _NEVER)
        if handle == last[0].handle == last[1].handle or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self._device)
        for used in set(last):
            if used.stream is not None and used.handle != handle:
                stream.wait_stream(used.stream)
        self._last = _thread.last[self._device] = _Used(handle, stream)


class SingleFlight:
    """A workspace serves one call at a time, on the host as on the device (`StreamOrder`): another thread inside a call
    is an error. Replays of a graph and eager calls belong on one stream.
    """

    def __init__(self, communicator: "P2PCommunicator"):
        self.communicator = communicator
        self._flying = threading.Lock()

    def __enter__(self) -> None:
        communicator = self.communicator
        if not self._flying.acquire(False):
            raise CommError(
                f"two threads are inside calls on group {communicator.name} (p2p): one workspace serves one call at a "
                "time; give each thread a group of its own (split)"
            )
        limit = communicator.deadlines.in_phase(watch.current_phase())
        communicator.launcher.deadline_ns = int(limit * 1e9)

    def __exit__(self, *error) -> None:
        self._flying.release()
