"""What an engine's step reports to its watcher: nobody (free), a clock, or a profiler."""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULE, PREFILL, DECODE, SAMPLE = "schedule", "prefill", "decode", "sample"
"""The spans of a step: one of PREFILL and DECODE launches its work, SAMPLE ends with its tokens on the host.

The next step's launch may come before this one's SAMPLE.
"""


class Watcher:
    """Notified of one rank's steps; what a watcher does not override it ignores."""

    def begin(self, name: str) -> None:
        """A span begins; spans do not overlap."""

    def end(self, name: str) -> None: ...

    def routed(self, ids: "Tensor") -> None:
        """Each token's experts [T, K] in one layer, where the layer runs outside of a graph."""


_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Name what this rank does inside the block."""
    watcher = _watcher.get()
    if watcher is None:
        yield
        return
    watcher.begin(name)
    try:
        yield
    finally:
        watcher.end(name)


def watched() -> bool:
    """Whether a watcher wants this rank's routing; a clock does not, and must not change what it times."""
    watcher = _watcher.get()
    return watcher is not None and type(watcher).routed is not Watcher.routed


def routed(ids: "Tensor") -> None:
    """Tell of a router's choice."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.routed(ids)


@contextmanager
def watched_by(watcher: Watcher | None) -> Iterator[None]:
    """Spans of this rank inside the block are reported to `watcher`; None: to nobody."""
    before = _watcher.get()
    _watcher.set(watcher)  # not reset by a token: a generator's end may come in another context
    try:
        yield
    finally:
        _watcher.set(before)
