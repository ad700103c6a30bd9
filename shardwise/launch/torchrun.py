"""Ranks under torchrun: demo mode as its users know it, with our supervisor around it."""

import re
import signal
import sys

from shardwise.launch.backend import LauncherProcess
from shardwise.launch.job import Job, rank_environment
from shardwise.parallel.host_memory import require_ranks

_FAILURE = re.compile(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s*exitcode\s*:\s*(-?\d+)")


class Torchrun(LauncherProcess):
    """torchrun always exits with 1; the rank's own code stands in its report."""

    name = "torchrun"

    def prepare(self, job: Job) -> None:
        require_ranks(job.world)

    def start(self, job: Job, description: dict) -> None:
        environment = rank_environment(job)
        environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun sets the same, with a warning
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(job.world)]
        command += ["--log-dir", str(job.launcher_folder)]  # its own choice would stay behind when it is ended
        self.launch(job, [*command, "-m", "shardwise.launch.worker", str(job.folder)], environment)

    def blame(self, text: str) -> dict[int, int | None]:
        failures = [(int(rank), int(code)) for rank, code in _FAILURE.findall(text)]
        if not failures:
            return {}
        *others, root = failures
        # A rank that torchrun ended, but that had reported its error, may stand there as the root cause.
        own = [each for each in (root, *others) if each[1] != -signal.SIGTERM]
        return dict(own[:1] or [root])
