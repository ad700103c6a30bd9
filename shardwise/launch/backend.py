"""What the supervisor asks of a launcher: start the ranks, say who died and how, end what was started."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shardwise.launch.job import Job


class Backend(ABC):
    """One launcher of ours, for one job."""

    name: str
    tcp_host: str | None = None
    """Where the parent listens for ranks; None: a Unix socket, all ranks are on this host."""

    @abstractmethod
    def prepare(self, job: Job) -> None:
        """Find what starting takes. Raises FileNotFoundError, ValueError or RuntimeError when this machine lacks it."""

    @abstractmethod
    def start(self, job: Job, description: dict) -> None:
        """Start the ranks."""

    @abstractmethod
    def sentinels(self) -> list[int]:
        """Descriptors that become readable when something that was started has ended."""

    @abstractmethod
    def exits(self) -> dict[int, int | None]:
        """Exit code of each rank that is known to have ended: negative for a signal, None where nobody knows."""

    @abstractmethod
    def running(self) -> bool:
        """Whether anything that was started directly still runs."""

    @abstractmethod
    def signal(self, signum: int) -> None:
        """Send `signum` to what was started directly."""

    def exit_code(self) -> int | None:
        """The launcher's own exit code, where there is a launcher process and it has ended."""
        return None

    def error_text(self) -> str | None:
        """What the launcher itself had to say when no rank ever reported."""
        return None

    def wait(self, seconds: float) -> bool:
        """Wait until nothing runs any more; False when the time is over."""
        end = time.monotonic() + seconds
        late = False
        while self.running():
            if late:
                return False
            time.sleep(0.005)
            late = time.monotonic() > end
        return True

    @abstractmethod
    def close(self) -> None:
        """Give back what `start` took beside processes."""


class SpawnerThread:
    """A thread that starts processes and lives as long as they may.

    The kernel's parent-death signal fires when the *thread* that forked ends; a caller's thread may end early.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], list, threading.Event] | None] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="shardwise-spawner", daemon=True).start()

    def call(self, function: Callable[[], Any]) -> Any:
        """The function's result, computed in that thread."""
        outcome: list = []
        done = threading.Event()
        self._calls.put((function, outcome, done))
        done.wait()
        value, error = outcome
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        self._calls.put(None)

    def _loop(self) -> None:
        while (item := self._calls.get()) is not None:
            function, outcome, done = item
            try:
                outcome += [function(), None]
            except BaseException as error:
                outcome += [None, error]
            done.set()


class LauncherProcess(Backend):
    """A launcher program of somebody else that starts the ranks: mpirun, torchrun."""

    def __init__(self) -> None:
        self._spawner = SpawnerThread()
        self._process: subprocess.Popen | None = None
        self._sentinel: int | None = None
        self._log: Path | None = None

    @abstractmethod
    def blame(self, text: str) -> dict[int, int | None]:
        """Exit codes by rank (as `exits`) that the launcher's own words report."""

    def launch(self, job: Job, command: Sequence[str], environment: dict[str, str]) -> None:
        tether = [sys.executable, "-I", "-S", str(Path(__file__).with_name("tether.py")), str(os.getpid())]
        self._log = job.logs / "launcher.log"
        with open(self._log, "wb") as log:
            self._process = self._spawner.call(
                lambda: subprocess.Popen(
                    [*tether, *command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        self._sentinel = os.pidfd_open(self._process.pid)

    def sentinels(self) -> list[int]:
        return [] if self._sentinel is None else [self._sentinel]

    def exits(self) -> dict[int, int | None]:
        return {} if self.running() else self.blame(self._words())

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, signum: int) -> None:
        if self._process is not None and self.running():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signum)

    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def error_text(self) -> str | None:
        lines = [line.strip() for line in self._words().splitlines() if line.strip().strip("-")]
        return " ".join(lines[:6]) or None

    def close(self) -> None:
        if self._sentinel is not None:
            os.close(self._sentinel)
            self._sentinel = None
        self._spawner.close()

    def _words(self) -> str:
        return self._log.read_text(errors="replace") if self._log and self._log.exists() else ""


def signed(code: int) -> int:
    """A launcher's 128 + signal as subprocess spells it."""
    return 128 - code if 128 < code <= 128 + signal.SIGRTMAX else code
