"""Ranks that the user's own mpirun or torchrun started: one is killed, and a survivor says what the launcher cannot."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_jobs import HERE, MARK, survivors

BIN = Path(sys.executable).parent
COMMANDS = {
    "mpirun": [BIN / "mpirun", "-n", "3", "--oversubscribe", "--bind-to", "none", sys.executable],
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "3"],
}


@pytest.fixture
def start(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    stale = {"rank": 7, "world": 8, "host": "h", "pid": 1, "phase": "run", "what": "old", "exit_code": 1, "time_ns": 1}
    (logs / "failure-rank-7.json").write_text(json.dumps(stale))

    def start(launcher, end):
        clean = {name: text for name, text in os.environ.items() if not name.startswith(("SHARDWISE_", "OMPI_"))}
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        more = {MARK: str(tmp_path), "SHARDWISE_LOG_DIR": str(logs), "PYTHONPATH": str(HERE.parents[1])}
        command = [*COMMANDS[launcher], HERE / "own_rank.py", end]
        return subprocess.Popen(command, env={**clean, **root, **more}, stderr=subprocess.PIPE, text=True), logs

    return start


@pytest.mark.parametrize("launcher", COMMANDS)
def test_a_killed_rank_is_reported_once_with_its_phase(start, tmp_path, launcher):
    for _ in range(3 if launcher == "mpirun" else 1):  # mpirun kills the others milliseconds later
        job, logs = start(launcher, "kill")
        words = job.communicate(timeout=200)[1]
        said = [line for line in words.splitlines() if "shardwise: rank" in line]
        if said:
            break
    assert len(said) == 1 and "rank 1 of 3 failed" in said[0]
    assert "while load: its process is gone, " in said[0] or "while load: killed by SIGKILL" in said[0]
    cause = json.loads((logs / "failure.json").read_text())
    assert (cause["rank"], cause["phase"], cause["victims"]) == (1, "load", [])
    assert f"pid {cause['pid']}" in said[0] and job.returncode == (137 if launcher == "mpirun" else 1)
    assert survivors(str(tmp_path)) == []


@pytest.mark.parametrize("launcher", COMMANDS)
def test_a_launcher_that_is_told_to_end_blames_no_rank(start, tmp_path, launcher):
    job, logs = start(launcher, "wait")
    end = time.monotonic() + 200
    while len(list(logs.glob("*.ready"))) < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert "shardwise: rank" not in job.communicate(timeout=200)[1]
    assert not (logs / "failure.json").exists()
    assert launcher == "mpirun" or list(logs.glob("*.pid")) == []  # mpirun may kill before a rank has cleared up
    assert survivors(str(tmp_path)) == []


def test_a_rank_that_does_not_come_to_mpi_is_named_once_by_the_others(start, tmp_path):
    """They wait for it inside MPI_Init."""
    job, logs = start("mpirun", "late")
    said = [line for line in job.communicate(timeout=200)[1].splitlines() if "shardwise: rank" in line]
    assert len(said) == 1 and said[0].endswith("rank(s) 1 did not arrive within 3 s") and job.returncode == 124
    cause = json.loads((logs / "failure.json").read_text())
    assert (cause["missing"], cause["exit_code"]) == ([1], 124)
    assert survivors(str(tmp_path)) == []


def test_a_job_that_ends_well_leaves_no_trace(start):
    job, logs = start("mpirun", "done")
    assert job.communicate(timeout=200)[1] == "" and job.returncode == 0
    assert sorted(path.suffix for path in logs.iterdir()) == [".ready"] * 3
