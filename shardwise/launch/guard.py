"""The one guard around every rank's body.

Whatever ends the body early, SystemExit included, becomes a `failure.json`, and then the whole job ends in the way
its launcher understands: MPI_Abort, or the process's exit code. A rank is also bound to the life of its launcher,
so that a killed launcher leaves nobody behind.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from shardwise.comm import leaving, watch
from shardwise.comm.rank import RankInfo
from shardwise.launch import failure as failures
from shardwise.launch.failure import Failure
from shardwise.launch.link import Link
from shardwise.parallel.options import made_folder

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
VICTIM_PAUSE = 2.0
"""Seconds that a victim leaves to the culprit: its exit and words come first, or its stacks while it still hangs."""
ECHO_PAUSE = 2.0
"""Seconds that rank 0 gets to fail like another rank, and to say so for both."""
ECHO_LOOK = 0.05


class Guard:
    """Knows who this rank is, where its reports go and how to end its job."""

    def __init__(self, info: RankInfo, folder: Path, link: Link | None = None, debug: bool = False):
        self.info = info
        self.folder = folder
        self.link = link
        self.debug = debug

    def run(self, body: Callable[[], T]) -> T:
        """`body()`. When it raises anything at all this process ends, and with it the job."""
        watch.give_up = self.fail
        try:
            return body()
        except BaseException as error:
            if isinstance(error, SystemExit) and error.code in (None, 0):
                raise
            self.fail(error)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what this rank does inside the block, here and to the parent."""
        before = watch.current_phase()
        self._tell({"event": "phase", "phase": name})
        with watch.phase(name):
            yield
        self._tell({"event": "phase", "phase": before})

    def fail(self, error: BaseException) -> NoReturn:
        """Report `error` and end the job."""
        found = failures.from_exception(
            error,
            rank=self.info.rank,
            world=self.info.world,
            phase=watch.current_phase(),
            last_collective=self.last_collective(),
        )
        for_all = self.link is None and found.input_error and self.info.rank == 0
        if for_all:  # before it is written down: ranks that find it there end the job, and this rank with it
            with contextlib.suppress(OSError):
                print(failures.report(found, debug=self.debug), file=sys.stderr, flush=True)
        path = None
        with contextlib.suppress(OSError):  # a full disk must not keep the job from ending
            watch.FLIGHT.dump(self.info.rank)
            path = failures.write(self.folder, found)
            _tell_torchrun(found)
        self._tell({"event": "failed", "failure": found.to_json()})
        if found.victim:
            time.sleep(VICTIM_PAUSE)  # whoever is still here after it was not ended by the culprit's exit
        if self.link is not None:
            print(found.trace, file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt) and not self.debug:
            if self.info.rank == 0:  # the launcher has passed it on to all
                print("shardwise: ended by SIGINT", file=sys.stderr)
        elif not for_all and not self._said(found):
            self._print(found, path)
        end_job(found.exit_code)

    def last_collective(self) -> str | None:
        """The collective that this rank began last, and whether it ended."""
        return _collective(watch.FLIGHT.last(self.info.rank)) if self.info.world > 1 else None

    def say(self, text: str) -> None:
        """On standard error, each line with this rank's name."""
        prefix = f"[r{self.info.rank}/{self.info.world} {socket.gethostname()}:{os.getpid()}] "
        print("".join(f"{prefix}{line}\n" for line in text.splitlines()), end="", file=sys.stderr, flush=True)

    def _tell(self, event: dict) -> None:
        if self.link is not None:
            with contextlib.suppress(OSError):  # the parent may be gone; ending still matters
                self.link.send(event)

    def _said(self, found: Failure) -> bool:
        """Whether another rank of this host says it: the cause, the first of those that waited in vain, or rank 0 of a
        wrong input."""
        if found.victim:
            cause = failures.primary(self._reports())
            return cause is not None and cause.rank != self.info.rank
        return found.input_error and self._said_by_rank_0(found)

    def _said_by_rank_0(self, found: Failure) -> bool:
        """Whether rank 0 fails alike within ECHO_PAUSE."""
        end = time.monotonic() + ECHO_PAUSE
        while True:
            late = time.monotonic() > end
            if any(other.rank == 0 and other.what == found.what for other in self._reports()):
                return True
            if late:
                return False
            time.sleep(ECHO_LOOK)

    def _reports(self) -> list[Failure]:
        """Of this job's ranks on this host. What is older than the launcher is an earlier job's."""
        launcher = os.getppid() or os.getpid()  # 0: it is outside of this rank's container
        began = time.time_ns() - watch.process_age_ns(launcher)
        return [each for each in failures.read_all(self.folder) if each.time_ns > began]

    def _print(self, found: Failure, path: Path | None) -> None:
        text = failures.report(found, path=path, debug=self.debug)
        if found.trace and not (found.explained or self.debug):
            text = f"{found.trace.rstrip()}\n{text}"
        self.say(text)


def end_job(code: int) -> NoReturn:
    """End this process, and with it the job, with `code`; no exit handler runs, since those may wait for peers."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def bind_to_parent(supervisor: tuple[int, int] | None = None) -> None:
    """Have the kernel kill this process when the process that started it dies.

    supervisor: (pid, start tick) of the process behind a launcher, checked once: it may have died before we could
    ask the kernel to tell us.
    """
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    gone = os.getppid() != parent or (supervisor is not None and not watch.process_alive(*supervisor))
    if gone:
        os._exit(128 + signal.SIGKILL)


def report_crashes() -> None:
    """Python stacks of all threads on stderr: at a fatal signal, and whenever SIGUSR2 arrives."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)


def job_folder(info: RankInfo) -> Path:
    """Where the reports of a job go that the user's own launcher started: the same for its ranks on one host.

    ValueError where a chosen one cannot be made. Of a place that nobody chose, whose name others can guess,
    PermissionError unless it is this user's alone.
    """
    chosen = os.environ.get(watch.LOG_FOLDER_ENV)
    if chosen:
        return Path(made_folder(watch.LOG_FOLDER_ENV, chosen))
    parent = os.getppid()
    name = f"{info.source.replace(' ', '').lower()}-{parent}-{watch.process_start(parent)}"
    return _private(Path(tempfile.gettempdir()) / f"shardwise-{os.getuid()}") / name


def _private(folder: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(
            f"{folder} is not this user's folder, and reports are read back from it: remove it, or name another "
            f"place by {watch.LOG_FOLDER_ENV}"
        )
    folder.chmod(0o700)
    return folder


def guard_script(info: RankInfo) -> None:
    """For a script that builds its own `LLM` under mpirun or torchrun: an uncaught exception ends the whole job."""
    own_guard = Guard(info, job_folder(info))
    sys.excepthook = lambda kind, error, trace: own_guard.fail(error)
    watch.give_up = own_guard.fail


def finalize(seconds: float, close: Callable[[], None] = lambda: None) -> None:
    """`close()` and MPI_Finalize, which both may wait for peers.

    A rank that does not get done with `close` within `seconds` shows its stack and ends with code 1. Peers that have
    work of their own left are waited for however long that takes; where one waits for this rank, or its groups are
    broken, MPI is not finalised. mpi4py would do so behind the interpreter's own end, where nothing bounds it.
    """

    def close_in_time() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True)
        close()
        faulthandler.cancel_dump_traceback_later()

    good = leaving.leave_all(seconds, close_in_time)
    mpi = sys.modules.get("mpi4py.MPI")
    if good and mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _collective(row: dict | None) -> str | None:
    if row is None:
        return None
    state = "pending" if not row["end"] else "done"
    return f"{row['op']} #{row['sequence']} {row['dtype']}{row['shape']} in {row['group']} ({state})"


def _tell_torchrun(found: Failure) -> None:
    """torchrun prints what the file that it names here has for a traceback as the root cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        words = found.what if found.explained else found.trace or found.what
        extra = {"py_callstack": words, "timestamp": str(found.time_ns // 10**9)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"message": {"message": found.what, "extraInfo": extra}}))
