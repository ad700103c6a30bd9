"""Start a function on several ranks: as threads of this process, or as processes.

`run_threads` is what most tests use: ranks share the process, so any closure will do. `run_processes` starts real
ranks; its function must be importable (`module:name`) and its arguments picklable.
"""

import contextlib
import contextvars
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
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
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
    mpi: bool = False,
    may_die: Collection[int] = (),
) -> list[Any]:
    """`target` ("module:function"), called as `function(info, store, *args)` in `world` processes; results in order.

    mpi      the ranks are started by mpirun and get `store=None`
    env      set in the ranks, on top of this process's environment
    may_die  ranks whose end, however it comes, is part of the test: their result is None
    Raises RankFailed for the rank that failed first, TimeoutError when the ranks need longer than `timeout` seconds.
    No process is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:
        (Path(folder) / "args").write_bytes(pickle.dumps((target, args)))
        start = _start_mpi if mpi else _start_local
        started = start(world, folder, {**os.environ, "PYTHONPATH": _python_path(), **(env or {})})
        try:
            _wait(started, folder, timeout, may_die)
        finally:
            _end(started)
        return [_result(folder, rank, may_die) for rank in range(world)]


def _result(folder: str, rank: int, may_die: Collection[int]) -> Any:
    path = Path(folder) / f"result{rank}"
    if rank in may_die and not path.exists():
        return None
    return pickle.loads(path.read_bytes())


def _python_path() -> str:
    return os.pathsep.join(filter(None, sys.path))


def _start_local(world: int, folder: str, env: dict[str, str]) -> list[subprocess.Popen]:
    env.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "shardwise.testing", folder]
    return [_spawn([*command, str(rank), str(world)], folder, rank, env) for rank in range(world)]


def _start_mpi(world: int, folder: str, env: dict[str, str]) -> list[subprocess.Popen]:
    from shardwise.launch.mpi import find

    flavour = find()
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    flags = flavour.flags(world, len(os.sched_getaffinity(0)), env)
    command = [flavour.path, *flags, sys.executable, "-m", "shardwise.testing", folder]
    env = {"OMP_NUM_THREADS": "1", **root, **env}
    return [_spawn(command, folder, 0, env)]


def _spawn(command: list[str], folder: str, rank: int, env: dict[str, str]) -> subprocess.Popen:
    with open(Path(folder) / f"log{rank}", "wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _wait(started: list[subprocess.Popen], folder: str, timeout: float, may_die: Collection[int]) -> None:
    end = time.monotonic() + timeout
    while True:
        over = time.monotonic() > end  # before the look at the ranks, which may have ended meanwhile
        codes = [process.poll() for process in started]
        for rank, code in enumerate(codes):
            if code not in (None, 0) and rank not in may_die:
                raise RankFailed(_log(folder, rank, code), rank)
        late = [rank for rank, code in enumerate(codes) if code is None]
        if not late:
            return
        if over:
            logs = "\n".join(_log(folder, rank, None) for rank in late)
            raise TimeoutError(f"rank(s) {late} still run after {timeout:g} s\n{logs}")
        time.sleep(0.005)


def _end(started: list[subprocess.Popen]) -> None:
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a rank has started and left
        process.wait()


def _log(folder: str, rank: int, code: int | None) -> str:
    text = (Path(folder) / f"log{rank}").read_text(errors="replace")
    return f"rank {rank} exit code {code}:\n{text[-4000:]}"


def _rank_main(folder: str, place: list[str]) -> None:
    from shardwise.comm.bootstrap import FolderStore
    from shardwise.launch.env import detect

    target, args = pickle.loads((Path(folder) / "args").read_bytes())
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    if place:
        rank, world = map(int, place)
        info, store = RankInfo(rank, world, rank, world, source="local"), FolderStore(Path(folder) / "store")
    else:
        info, store = detect(), None
    result = function(info, store, *args)
    unfinished = Path(folder) / f"result{info.rank}.tmp"
    unfinished.write_bytes(pickle.dumps(result))
    unfinished.rename(Path(folder) / f"result{info.rank}")  # whole, or not there: mpirun may end this rank meanwhile


if __name__ == "__main__":
    _rank_main(sys.argv[1], sys.argv[2:])
