"""A job: one function that runs on every rank, where its files go, what its ranks get, and how it may end."""

import fcntl
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shardwise.comm import watch
from shardwise.comm.watch import Deadlines
from shardwise.launch.failure import Failure
from shardwise.parallel.options import made_folder


class JobFailed(RuntimeError):
    """A rank failed. The text is the report for a terminal; `failure` the cause, `exit_code` the job's."""

    def __init__(self, text: str, failure: Failure, path: Path | None = None):
        super().__init__(text)
        self.failure = failure
        self.exit_code = failure.exit_code
        self.path = path
        """The `failure.json`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the ranks shall do, and where their files go."""

    target: str
    """`module:function`, called as function(context) on every rank."""
    payload: Mapping[str, Any]
    """JSON values for the function."""
    world: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the ranks get beside the parent's."""
    deadlines: Deadlines = field(default_factory=Deadlines.from_environment)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="shardwise-")))
    """Private to the job: socket, store, description. Removed when the job went well."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    debug: bool = False

    @cached_property
    def logs(self) -> Path:
        """One log a rank, and the reports of failures; SHARDWISE_LOG_DIR chooses another place.

        A place in which another job is running lends a folder of its own inside. ValueError where none can be made.
        """
        chosen = os.environ.get(watch.LOG_FOLDER_ENV)
        if not chosen:
            return self.folder / "logs"
        folder = Path(made_folder(watch.LOG_FOLDER_ENV, chosen))
        return folder if self._claim.take(folder) else folder / f"job-{os.getpid()}-{self.token[:6]}"

    @cached_property
    def _claim(self) -> "Claim":
        return Claim()

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def launcher_folder(self) -> Path:
        """For files that a launcher makes for itself."""
        return self.folder / "launcher"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def describe(self, address: str | tuple[str, int]) -> dict:
        """What a rank must know, as JSON values."""
        pid = os.getpid()
        return {
            "target": self.target,
            "payload": dict(self.payload),
            "world": self.world,
            "address": address,
            "token": self.token,
            "logs": str(self.logs),
            "deadlines": asdict(self.deadlines),
            "supervisor": [pid, watch.process_start(pid)],
        }

    def prepare(self) -> None:
        """Make the folders; reports that an earlier job left in a chosen log folder go."""
        self.logs.mkdir(parents=True, exist_ok=True)
        for old in [*self.logs.glob("failure*.json"), *self.logs.glob("rank-*.log")]:
            old.unlink(missing_ok=True)

    def write(self, description: dict) -> None:
        (self.folder / "job.json").write_text(json.dumps(description))

    def clean(self, failed: bool) -> None:
        """Remove the private folder; after a failure the logs stay."""
        self._claim.release()
        if not failed:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for folder in (self.store, self.launcher_folder):
            shutil.rmtree(folder, ignore_errors=True)
        (self.folder / "job.json").unlink(missing_ok=True)
        if self.logs.parent != self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


class Claim:
    """A folder that belongs to one job at a time: a lock that ends with its process, whatever happens to it."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path) -> bool:
        """False when another job has it."""
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "job.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def rank_environment(job: Job) -> dict[str, str]:
    """This process's environment as a rank of ours shall see it, before its place is added."""
    from shardwise.launch import env

    root = str(Path(__file__).resolve().parents[2])
    search = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **env.without_launcher(os.environ),
        **env.NO_MULTICAST,
        watch.LOG_FOLDER_ENV: str(job.logs),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(search)),
        "PYTHONUNBUFFERED": "1",
        **job.environment,
    }


def worker_command(job: Job) -> list[str]:
    return [sys.executable, "-m", "shardwise.launch.worker", str(job.folder)]
