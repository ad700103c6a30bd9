"""Start a job that fails, in a process of its own or in the test's, and look for what is left of it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shardwise.comm.watch import process_alive, process_start
from shardwise.launch.exit_status import exit_code
from shardwise.launch.failure import Failure
from shardwise.launch.job import JobFailed
from shardwise.launch.start import run_job

HERE = Path(__file__).parent
MARK = "SHARDWISE_TEST_JOB"


@dataclass(frozen=True)
class Failed:
    """What a failed job left behind."""

    error: JobFailed
    seconds: float
    """From the failure to the end of the job."""
    survivors: list[int]

    @property
    def failure(self) -> Failure:
        return self.error.failure

    @property
    def file(self) -> dict:
        assert self.error.path is not None
        return json.loads(self.error.path.read_text())


def fail(tmp_path: Path, launcher: str, body: str, payload: dict | None = None, **environment: str) -> Failed:
    """Run `fault_bodies:<body>` on two ranks, which must fail."""
    mark = f"{tmp_path}-{time.monotonic_ns()}"
    try:
        run_job(
            f"fault_bodies:{body}",
            payload,
            world=2,
            launcher=launcher,
            environment=job_environment(mark, **environment),
        )
    except JobFailed as error:
        return Failed(error, (time.time_ns() - error.failure.time_ns) / 1e9, survivors(mark))
    raise AssertionError("the job did not fail")


def kernel_tells() -> bool:
    """Whether this kernel says how a process ended that is not one's child."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = os.pidfd_open(process.pid)
    process.wait()
    code = exit_code(pidfd)
    os.close(pidfd)
    return code is not None


def job_environment(mark: str, **more: str) -> dict[str, str]:
    root = HERE.parent.parent
    return {MARK: mark, "PYTHONPATH": f"{root}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", **more}


def survivors(mark: str, patience: float = 2.0) -> list[int]:
    """Pids of living processes that carry the job's mark in their environment, once `patience` is over."""
    end = time.monotonic() + patience
    while (found := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _marked(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            marked = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if marked and process_alive(int(entry.name), process_start(int(entry.name))):
                found.append(int(entry.name))
        except (OSError, ProcessLookupError):
            continue
    return found


def start_parent(mark: str, launcher: str, body: str, log_folder: Path) -> subprocess.Popen:
    """A process that runs `fault_bodies:<body>` on two ranks by `launcher`, and prints `ready` once they all are."""
    program = (
        "import sys, fault_jobs\n"
        "from shardwise.launch.interrupt import interruptible, Interrupted\n"
        "from shardwise.launch.start import run_job\n"
        "ready = []\n"
        "def seen(event):\n"
        "    ready.append(event)\n"
        "    if len(ready) == 2: print('ready', flush=True)\n"
        "try:\n"
        "    with interruptible():\n"
        f"        run_job('fault_bodies:{body}', world=2, launcher={launcher!r},\n"
        f"                environment=fault_jobs.job_environment({mark!r}), on_event=seen)\n"
        "except Interrupted as error:\n"
        "    sys.exit(error.exit_code)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **job_environment(mark), "SHARDWISE_LOG_DIR": str(log_folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
