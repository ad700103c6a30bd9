"""Scratch memory of kernels that split sums or group pairs, by name, and counters that are zero between calls."""

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shardwise.ops.scratch import capturing


class Workspace:
    """Scratch tensors of one call, kept between calls for few tokens, where the host time of allocating counts.

    One set a thread (ranks may be threads), device, stream and token count: concurrent callers never share it, nor do
    graphs lose it; graphs captured on one stream share it and must not run at the same time. gpt-oss-120b's sets take
    80 KB a token with one part of K, 170 MB where all counts up to KEPT_TOKENS come. The set of no token is for what a
    launch needs whatever its tokens.
    """

    KEPT_TOKENS = 64

    def __init__(self, owner: tuple):
        self._owner = owner
        self._tensors: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, device: torch.device, tokens: int) -> "Workspace":
        """The workspace for a call with so many tokens on the current stream."""
        owner = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        if tokens > cls.KEPT_TOKENS:
            return cls(owner)
        return _held(owner, _kept("workspaces").setdefault((*owner, tokens), cls(owner)))

    @staticmethod
    def keeps(tensor: Tensor) -> str:
        """What this thread keeps the tensor's memory for: "scratch", "counters" or, of other memory, nothing."""
        storage = tensor.untyped_storage()._cdata

        def among(tensors: Iterable[Tensor]) -> bool:
            return any(kept.untyped_storage()._cdata == storage for kept in tensors)

        spaces = _kept("workspaces").values()
        if among(kept for space in spaces for kept in space._tensors.values()):
            return "scratch"
        return "counters" if among(_kept("counters").values()) else ""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, the same at every call."""
        key = (name, shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=dtype, device=self._owner[0])
        return self._tensors[key]

    def counters(self, count: int) -> Tensor:
        """`count` int32 zeros; kernels that count in them leave zeros behind, so they are set once only.

        A stream whose first call is being captured takes a row that an earlier eager call set aside: zeros made
        inside a capture come true at its replay, too late for a second graph that uses the same row.
        """
        row = _row(self._owner) if count <= _ROW else None
        if row is None:
            return torch.zeros(count, dtype=torch.int32, device=self._owner[0])
        return _held(self._owner, row)


_ROWS, _ROW = 32, 4096  # streams of one thread; programs of a launch, or router blocks of a call: 262144 tokens
_THREAD = threading.local()
_HELD: set = set()
"""What graphs were captured with: they may be replayed when the thread that captured them has ended."""


def _held(owner: tuple, kept: Any) -> Any:
    """`kept`, which a call on this stream is to use; where it is captured, for as long as the process lives."""
    device, stream = owner
    if stream and device.type == "cuda" and capturing():  # nothing can be captured on the default stream, which is 0
        _HELD.add(kept)
    return kept


def _kept(kind: str) -> dict:
    """What this thread keeps of a kind."""
    return _THREAD.__dict__.setdefault(kind, {})


def _row(owner: tuple) -> Tensor | None:
    """The counters of one stream; None if it has none yet and cannot get any now."""
    rows = _kept("counters")
    if owner in rows:
        return rows[owner]
    device = owner[0]
    free = _kept("free counters").setdefault(device, [])
    if not free:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        free.extend(torch.zeros(_ROWS, _ROW, dtype=torch.int32, device=device).unbind())
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    rows[owner] = free.pop()
    return rows[owner]
