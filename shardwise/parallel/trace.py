"""Named spans of an engine's step, for whoever watches: nobody (free), a clock, or a profiler."""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SCHEDULE, PREFILL, DECODE, SAMPLE = "schedule", "prefill", "decode", "sample"
"""The spans of a step, in their order: one of PREFILL and DECODE; SAMPLE ends it with the tokens on the host."""


class Watcher(Protocol):
    """Is told when a span of this rank begins and ends."""

    def begin(self, name: str) -> None: ...

    def end(self, name: str) -> None: ...


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


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Spans inside the block, of this rank, are told to `watcher`."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
