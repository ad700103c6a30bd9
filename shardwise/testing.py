"""Start a function on several ranks: as threads of this process, or as processes.

`run_threads` is what most tests use: ranks share the process, so any closure will do. `run_processes` starts real
ranks; its function must be importable (`module:name`) and its arguments picklable.
"""

import contextvars
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardwise.comm.rank import RankInfo, use_groups


class RankFailed(RuntimeError):
    """A rank of `run_processes` failed; the text holds its error output."""

    def __init__(self, text: str, rank: int):
        super().__init__(text)
        self.rank = rank


def run_threads(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    layout=None,
    deadlines=None,
    check: bool | None = None,
    deterministic: bool | None = None,
) -> list[Any]:
    """`fn(*args)` on `world` ranks as threads, inside `use_groups`; results in rank order.

    layout   a ParallelLayout for the groups; None: tensor parallelism over all ranks
    The first exception (in time) is raised; the other ranks are unblocked by it.
    """
    from shardwise.comm.strategy import make_groups
    from shardwise.comm.threads import Board, ThreadsCommunicator

    board = Board(world)
    results: list[Any] = [None] * world
    failures: list[BaseException] = []

    def body(rank: int) -> None:
        communicator = ThreadsCommunicator(
            board, rank, range(world), deadlines=deadlines, check=check, deterministic=deterministic
        )
        try:
            with use_groups(make_groups(communicator, layout)):
                results[rank] = fn(*args)
        except BaseException as error:  # a SystemExit in one rank must not leave the others waiting
            failures.append(error)
            board.break_up(f"rank {rank} failed: {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(body, rank), name=f"rank {rank}", daemon=True)
        for rank in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def run_processes(
    world: int,
    target: str,
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """`target` ("module:function"), called as `function(info, store, *args)` in `world` processes; results in order.

    Raises RankFailed for the rank that failed first, TimeoutError when the ranks need longer than `timeout` seconds.
    No process is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:
        (Path(folder) / "args").write_bytes(pickle.dumps((target, args)))
        ranks = [_start(rank, world, folder, env or {}) for rank in range(world)]
        try:
            _wait(ranks, folder, time.monotonic() + timeout, timeout)
        finally:
            for process in ranks:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world)]


def _start(rank: int, world: int, folder: str, env: Mapping[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "shardwise.testing", folder, str(rank), str(world)]
    with open(Path(folder) / f"log{rank}", "wb") as log:
        return subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **env},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ranks: list[subprocess.Popen], folder: str, end: float, timeout: float) -> None:
    while any(process.poll() is None for process in ranks):
        for rank, process in enumerate(ranks):
            if process.poll() not in (None, 0):
                raise RankFailed(_log(folder, rank, process.returncode), rank)
        if time.monotonic() > end:
            late = [rank for rank, process in enumerate(ranks) if process.poll() is None]
            logs = "\n".join(_log(folder, rank, None) for rank in late)
            raise TimeoutError(f"rank(s) {late} still run after {timeout:g} s\n{logs}")
        time.sleep(0.005)
    for rank, process in enumerate(ranks):
        if process.returncode != 0:
            raise RankFailed(_log(folder, rank, process.returncode), rank)


def _log(folder: str, rank: int, code: int | None) -> str:
    text = (Path(folder) / f"log{rank}").read_text(errors="replace")
    return f"rank {rank} exit code {code}:\n{text[-4000:]}"


def _rank_main(folder: str, rank: int, world: int) -> None:
    import importlib

    from shardwise.comm.bootstrap import FolderStore

    target, args = pickle.loads((Path(folder) / "args").read_bytes())
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    info = RankInfo(rank, world, rank, world, source="local")
    result = function(info, FolderStore(Path(folder) / "store"), *args)
    (Path(folder) / f"result{rank}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _rank_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
