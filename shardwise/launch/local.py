"""Ranks as children of this process: a fresh interpreter each, so that plain scripts need no main guard."""

import contextlib
import functools
import os
import subprocess

from shardwise.comm.bootstrap import STORE_ENV
from shardwise.comm.rank import RankInfo
from shardwise.launch import env
from shardwise.launch.backend import Backend, SpawnerThread
from shardwise.launch.job import Job, rank_environment, worker_command
from shardwise.parallel.host_memory import require_ranks


class Local(Backend):
    """Each rank leads a process group of its own: Ctrl-C reaches the parent alone, which then ends them in order."""

    name = "local"

    def __init__(self) -> None:
        self._spawner = SpawnerThread()
        self._processes: list[subprocess.Popen] = []
        self._sentinels: list[int] = []

    def prepare(self, job: Job) -> None:
        require_ranks(job.world)

    def start(self, job: Job, description: dict) -> None:
        for rank in range(job.world):
            process = self._spawner.call(functools.partial(self._spawn, job, rank))
            self._processes.append(process)
            self._sentinels.append(os.pidfd_open(process.pid))

    def _spawn(self, job: Job, rank: int) -> subprocess.Popen:
        info = RankInfo(rank, job.world, rank, job.world, source=self.name)
        threads = str(max(1, len(os.sched_getaffinity(0)) // job.world))
        environment = {"OMP_NUM_THREADS": threads, **rank_environment(job), **env.rank_variables(info)}
        environment[STORE_ENV] = str(job.store)
        with open(job.log(rank), "wb") as log:
            return subprocess.Popen(
                worker_command(job),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def sentinels(self) -> list[int]:
        return self._sentinels

    def exits(self) -> dict[int, int | None]:
        ended = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
        return {rank: self._processes[rank].returncode for rank in ended}

    def running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def signal(self, signum: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)

    def close(self) -> None:
        for descriptor in self._sentinels:
            os.close(descriptor)
        self._sentinels = []
        self._spawner.close()
