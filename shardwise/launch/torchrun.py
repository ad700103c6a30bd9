"""Ranks under torchrun: demo mode as its users know it, with our supervisor around it."""

import re
import sys

from shardwise.launch.backend import LauncherProcess
from shardwise.launch.job import Job, rank_environment
from shardwise.parallel.host_memory import require_ranks

_ROOT_CAUSE = re.compile(r"rank\s*:\s*(\d+)\s*\(local_rank.*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


class Torchrun(LauncherProcess):
    """torchrun always exits with 1; the rank's own code stands in its report."""

    name = "torchrun"

    def prepare(self, job: Job) -> None:
        require_ranks(job.world)

    def start(self, job: Job, description: dict) -> None:
        environment = rank_environment(job)
        environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun sets the same, with a warning
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(job.world)]
        self.launch(job, [*command, "-m", "shardwise.launch.worker", str(job.folder)], environment)

    def blame(self, text: str) -> dict[int, int | None]:
        _, found, report = text.rpartition("Root Cause")
        match = _ROOT_CAUSE.search(report) if found else None
        return {int(match[1]): int(match[2])} if match else {}
