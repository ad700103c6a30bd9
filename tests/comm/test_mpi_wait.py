"""A wait inside MPI that nobody comes to: who is named, by ranks of which one waits too and another one does not."""

import os
import queue
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.comm import mpi_wait, watch
from shardwise.comm.base import CollectiveTimeout

WAITS = """
import sys
from shardwise.comm.mpi_wait import NAME, bounded
with bounded(2, range(3), 1000):
    print(flush=True)
    sys.stdin.read()
"""
RESTS = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture
def start():
    """Start a process as rank N of a job of Open MPI's."""
    processes = []

    def start(rank: int, program: str, job: str) -> None:
        root = str(Path(__file__).parents[2])
        place = {"PMIX_NAMESPACE": job, "OMPI_COMM_WORLD_RANK": str(rank), "PYTHONPATH": root}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **place}, **pipes))
        assert processes[-1].stdout.readline() == b"\n"

    yield start
    for process in processes:
        process.communicate()


@pytest.fixture
def given_up(monkeypatch):
    errors: queue.Queue[CollectiveTimeout] = queue.Queue()
    monkeypatch.setattr(watch, "give_up", errors.put)
    return errors


def test_ranks_of_this_host_that_do_not_wait_are_named(start, given_up, monkeypatch, tmp_path):
    monkeypatch.setenv("PMIX_NAMESPACE", str(tmp_path))
    start(1, RESTS, str(tmp_path))
    start(2, WAITS, str(tmp_path))
    start(0, RESTS, "another job")
    with mpi_wait.bounded(0, range(3), 0.01):
        error = given_up.get(timeout=60)
    assert str(error) == "rendezvous by MPI, rank 0: rank(s) 1 did not arrive within 0.01 s" and error.missing == (1,)


def test_where_all_of_this_host_wait_the_missing_are_elsewhere(start, given_up, monkeypatch, tmp_path):
    monkeypatch.setenv("PMIX_NAMESPACE", str(tmp_path))
    for rank in (0, 2):
        start(rank, WAITS, str(tmp_path))
    with mpi_wait.bounded(0, range(4), 0.01):
        error = given_up.get(timeout=60)
    assert str(error).endswith("not all 4 ranks arrived, those of this host did, within 0.01 s")
    assert error.missing == ()


def test_a_wait_that_ends_in_time_is_none(given_up):
    with mpi_wait.bounded(0, range(2), 1000):
        pass
    assert given_up.empty()


def test_without_a_guard_the_process_ends_with_the_sentence_and_the_code_of_a_deadline():
    program = "from shardwise.comm.mpi_wait import bounded\nwith bounded(0, range(2), 0.01): input()"
    job = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert job.stderr.read() == "CollectiveTimeout: rendezvous by MPI, rank 0: not all 2 ranks arrived within 0.01 s\n"
    assert job.wait(60) == 124
