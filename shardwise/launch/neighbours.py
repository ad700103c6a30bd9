"""What a rank under the user's own launcher has to say when another rank of its host dies.

mpirun and torchrun tell the signal of a rank that was killed, and end the others at once, often before these have
missed it. Those others can add what the ranks were doing, whether the kernel killed for memory, and a report on disk.
Each rank leaves a file with its pid in the job's folder while it works; who goes and leaves it there has died.
"""

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path

from shardwise.comm import watch
from shardwise.comm.watch import Deadlines
from shardwise.launch import failure as failures
from shardwise.launch import postmortem
from shardwise.launch.exit_status import exit_code
from shardwise.launch.failure import Failure
from shardwise.launch.guard import Guard

LOOK_SECONDS = 0.05
"""Between looks for ranks that have not started yet."""


class Neighbours:
    """The other ranks of this host, from `join` until `leave` or SIGTERM."""

    def __init__(self, guard: Guard):
        self.guard = guard
        self._mine = guard.folder / f"rank-{guard.info.rank}.pid"
        self._launcher = os.getppid()
        self._started = watch.process_start(self._launcher)
        self._kills = postmortem.out_of_memory_kills()
        self._known: dict[int, Path] = {}
        """The file of each rank whose end is watched, by the descriptor that tells of it."""

    def join(self) -> None:
        """Be seen, and watch in a thread of its own, since the main thread may be inside native code."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Before this rank is seen: one that SIGTERM ends must not leave its file, which would make its end a cause.
        signal.signal(signal.SIGTERM, lambda signum, frame: None)  # without a handler the pipe would hear nothing
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        with contextlib.suppress(OSError):  # on a full disk the job runs without last words
            self.guard.folder.mkdir(parents=True, exist_ok=True)
            failures.forget(self.guard.folder, self.guard.info.rank, self.guard.info.world)
            own = [os.getpid(), watch.process_start(os.getpid()), self._launcher, self._started]
            self._mine.write_text(json.dumps(own))
        threading.Thread(target=self._watch, args=(reader,), name="shardwise-neighbours", daemon=True).start()

    def leave(self) -> None:
        with contextlib.suppress(OSError):  # reports, or the files of others, are in it; or the disk takes no change
            self._mine.unlink(missing_ok=True)
            if watch.LOG_FOLDER_ENV not in os.environ:
                self.guard.folder.rmdir()

    def _watch(self, signals: int) -> None:
        ends = select.poll()
        ends.register(signals, select.POLLIN)
        until = time.monotonic() + Deadlines.from_environment().start
        while True:
            complete = len(self._known) >= self.guard.info.local_world - 1 or time.monotonic() > until
            ready = [descriptor for descriptor, _ in ends.poll(None if complete else 1e3 * LOOK_SECONDS)]
            # SIGTERM first: the launcher ends all of us, and a rank that it has killed since is no cause.
            for descriptor in sorted(ready, key=lambda each: each != signals):
                if descriptor != signals:
                    ends.unregister(descriptor)
                    with contextlib.suppress(OSError):
                        self._tell(self._known[descriptor], descriptor)
                elif os.read(signals, 1)[0] == signal.SIGTERM:
                    self._mine.unlink(missing_ok=True)  # first, so that nobody takes this end for a cause
                    os._exit(128 + signal.SIGTERM)
            if not complete:
                with contextlib.suppress(OSError, ValueError):
                    self._meet(ends)

    def _meet(self, ends: select.poll) -> None:
        """Watch the ranks that have started since the last look."""
        for path in set(self.guard.folder.glob("rank-*.pid")) - {self._mine, *self._known.values()}:
            pid, started, *launcher = json.loads(path.read_text())
            ours = launcher == [self._launcher, self._started]  # else an earlier job left it
            if ours and watch.process_alive(pid, started):
                descriptor = os.pidfd_open(pid)
                self._known[descriptor] = path
                ends.register(descriptor, select.POLLIN)

    def _tell(self, path: Path, pidfd: int) -> None:
        """Report the rank of this file, if it went without a word and no other rank reports it."""
        rank = int(path.stem.removeprefix("rank-"))
        launcher_left = os.getppid() != self._launcher  # then the kernel ends all ranks
        if launcher_left or any(not each.victim or each.rank == rank for each in failures.read_all(self.guard.folder)):
            return
        pid = json.loads(path.read_text())[0]
        path.unlink()  # FileNotFoundError: that rank ended well, or another one is first to report it
        info, last, code = self.guard.info, self.guard.last_collective(), exit_code(pidfd)
        what = f"its process is gone, {info.source} says of what" if code is None else postmortem.spell(code)
        found = Failure(
            rank=rank,
            world=info.world,
            host=socket.gethostname(),
            pid=pid,
            phase=watch.current_phase(),
            what=what + (f"; rank {info.rank} had come to {last}" if last else ""),
            exit_code=postmortem.job_code(code),
            time_ns=time.time_ns(),
            hint=postmortem.hint_for(code, postmortem.out_of_memory_kills() > self._kills),
        )
        self.guard.say(failures.report(found, path=failures.write(self.guard.folder, found)))
