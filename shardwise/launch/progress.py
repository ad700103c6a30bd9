"""Loading, shown: a bar on a terminal, lines elsewhere: one per ten percent, but no more than one a second."""

import contextlib
import time
from typing import Any, TextIO

GB = 1e9
PAUSE = 1.0
"""Seconds between two lines."""


class LoadProgress:
    """Context manager; `update(done, total)` takes bytes of rank 0's part."""

    def __init__(self, stream: TextIO, enabled: bool = True):
        self._stream, self._enabled = stream, enabled
        self._bar: Any = None
        self._task: Any = None
        self._started: float | None = None
        self._tenths = 0
        self._told = 0.0

    def __enter__(self) -> "LoadProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        if not self._enabled:
            return
        if self._started is None:
            self._started = self._told = time.perf_counter()
        if self._stream.isatty():
            self._draw(done, total)
        else:
            self._line(done, total)

    def note(self, text: str) -> None:
        """One line about what comes after loading."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._enabled:
            with contextlib.suppress(OSError):
                print(text, file=self._stream, flush=True)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar, self._task = _bar(self._stream, total)
        self._bar.update(self._task, completed=done)

    def _line(self, done: int, total: int) -> None:
        tenths, now = 10 * done // max(1, total), time.perf_counter()
        if tenths <= self._tenths or (done < total and now - self._told < PAUSE):
            return
        self._tenths, self._told = tenths, now
        seconds = now - (self._started or 0.0)
        rate = f", {done / seconds / GB:.2f} GB/s" if seconds > 0.05 else ""
        with contextlib.suppress(OSError):  # a closed stderr is no reason to stop loading
            print(f"loading {10 * tenths} % of rank 0's {total / 2**20:.1f} MiB{rate}", file=self._stream, flush=True)


def _bar(stream: TextIO, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(file=stream), transient=True)
    task = bar.add_task("loading", total=total)
    bar.start()
    return bar, task
