"""How programs end that have nobody around them but their launcher: with the right code, soon, and all of them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardwise.comm import leaving

pytestmark = pytest.mark.alone
PROGRAM = Path(__file__).with_name("ending_ranks.py")
BIN = Path(sys.executable).parent


def mpirun(how, transport, **variables):
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("SHARDWISE_", "OMPI_"))}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = [BIN / "mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, PROGRAM]
    done = subprocess.run(
        [*command, how, transport],
        env={**clean, **root, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
        capture_output=True,
        text=True,
        timeout=90,  # of which the program takes four; a rank that others wait for in vain sleeps for longer
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("transport, code", [("shm", 3), ("messages", 7)])
def test_a_rank_that_exits_under_mpirun_is_lost_to_those_who_wait_for_it(transport, code):
    found, words = mpirun("exit", transport)
    assert "PeerLost: all_reduce #2 on group world, rank 0: rank(s) 1 will not arrive" in words
    assert found == code


def test_a_rank_that_hangs_keeps_no_job_of_mpirun():
    limits = {"SHARDWISE_DEADLINE_COLLECTIVE": "0.5", "SHARDWISE_DEADLINE_STOP": "0.5"}
    code, words = mpirun("hang", "mpi", **limits)
    assert "CollectiveTimeout: all_reduce #2 on group world, rank 0: rank(s) 1 did not arrive" in words
    assert code == 7


def test_a_difference_that_all_ranks_handle_is_no_failure_of_the_job():
    assert mpirun("caught", "mpi") == (0, "")


def test_ranks_that_are_done_wait_for_one_that_works_on():
    assert mpirun("work", "shm", SHARDWISE_DEADLINE_STOP="0.5") == (0, "rank 0 is done\n")


def test_a_rank_of_gloo_ends_though_its_call_never_does(tmp_path):
    def start(rank, how, **variables):
        place = {"RANK": rank, "WORLD": 2, "LOCAL_RANK": rank, "LOCAL_WORLD": 2, "NODE": 0, "STORE": tmp_path}
        own = {f"SHARDWISE_{name}": str(value) for name, value in place.items()}
        path = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            [sys.executable, PROGRAM, how, "gloo"],
            env={**os.environ, **own, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables},
            stdout=subprocess.PIPE,
            text=True,
        )

    hanging, waiting = (
        start(1, "hang"),
        start(0, "hang", SHARDWISE_DEADLINE_COLLECTIVE="0.5", SHARDWISE_DEADLINE_STOP="1"),
    )
    try:
        words, _ = waiting.communicate(timeout=90)
        assert "CollectiveTimeout: all_reduce #2 on group world, rank 0: rank(s) 1 did not arrive" in words
        assert waiting.returncode == 1
    finally:
        hanging.kill()
        hanging.communicate()


def meeting(*answers, whole=True):
    left = iter(answers)
    return SimpleNamespace(whole=whole, end=lambda: None, peers_left=lambda: next(left))


@pytest.mark.parametrize(
    "meetings, finalised",
    [
        ([], True),
        ([meeting(False, False, True)], True),
        ([meeting(True), meeting(False, True)], True),
        ([meeting(False, None), meeting(True)], False),
        ([meeting(*[False] * 1000, whole=False)], False),
    ],
    ids=["no group", "in their time", "one by one", "one is waited for", "a broken group"],
)
def test_mpi_is_finalised_when_all_ranks_have_left(monkeypatch, meetings, finalised):
    monkeypatch.setattr(leaving, "_meetings", meetings)
    monkeypatch.setattr(leaving, "_unusable", False)
    begin = time.monotonic()
    assert leaving.leave_all(0.05) is finalised
    assert time.monotonic() - begin < 5
