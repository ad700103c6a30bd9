"""Failure records: what an exception becomes, which of several is the cause, what a user reads."""

import json

import pytest

from shardwise.comm.base import CollectiveMismatch, CollectiveTimeout, PeerLost, Unavailable
from shardwise.launch.cli import UsageError
from shardwise.launch.failure import Failure, from_exception, primary, read_all, report, write
from shardwise.launch.torchrun import Torchrun
from shardwise.sharding.cutting import IllegalLayout


def failure(rank: int, time_ns: int, **changes) -> Failure:
    values = {
        "world": 4,
        "host": "node",
        "pid": 100 + rank,
        "phase": "run",
        "what": f"RuntimeError: of rank {rank}",
        "exit_code": 1,
        **changes,
    }
    return Failure(rank=rank, time_ns=time_ns, **values)


def of(error: BaseException) -> Failure:
    return from_exception(error, rank=2, world=4, phase="load", last_collective="all_reduce #7")


@pytest.mark.parametrize(
    "error, code, victim",
    [
        (RuntimeError("boom"), 1, False),
        (SystemExit(3), 3, False),
        (SystemExit("text"), 1, False),
        (KeyboardInterrupt(), 130, False),
        (MemoryError(), 1, False),
        (CollectiveTimeout("late", (1,)), 124, True),
        (PeerLost("gone", (1,)), 1, True),
        (CollectiveMismatch("shapes differ"), 1, False),
        (Unavailable("transport nccl moves CUDA tensors"), 2, False),
        (IllegalLayout("tp 99 does not fit", ()), 2, False),
        (UsageError("--input 9000 is more than the context"), 2, False),
        (ConnectionResetError("reset"), 1, True),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]"), 1, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_exception_becomes_a_record(error, code, victim):
    found = of(error)
    assert (found.exit_code, found.victim) == (code, victim)
    assert (found.rank, found.phase, found.last_collective) == (2, "load", "all_reduce #7")
    assert type(error).__name__ in found.what


def test_only_a_missed_deadline_accuses_ranks():
    assert of(CollectiveTimeout("late", (1, 3))).missing == (1, 3)
    assert of(PeerLost("gone", (1,))).missing == ()


def test_the_cause_is_the_earliest_that_nobody_else_explains():
    early_victim = failure(0, 100, victim=True)
    cause, later = failure(2, 200), failure(3, 201)
    found = primary([later, early_victim, cause])
    assert found.rank == 2
    assert [each.rank for each in found.victims] == [3, 0]


def test_among_victims_alone_the_first_is_reported():
    assert primary([failure(1, 20, victim=True), failure(0, 10, victim=True)]).rank == 0
    assert primary([]) is None


def test_reports_survive_the_disk_and_the_folder_names_the_cause(tmp_path):
    write(tmp_path, failure(0, 100, victim=True))
    path = write(tmp_path, failure(1, 50, trace="Traceback", missing=(3,)))
    stored = Failure.from_json(json.loads(path.read_text()))
    assert path.name == "failure.json"
    assert (stored.rank, stored.missing, [each.rank for each in stored.victims]) == (1, (3,), [0])
    assert [each.rank for each in read_all(tmp_path)] == [0, 1]


def test_the_report_names_rank_host_pid_phase_and_collective():
    text = report(failure(1, 5, last_collective="all_reduce #7", hint="buy memory", log="/logs/rank-1.log"))
    for word in ("rank 1 of 4", "host node", "pid 101", "while run", "all_reduce #7", "buy memory", "/logs/rank-1.log"):
        assert word in text


def test_a_choice_that_cannot_run_here_is_one_sentence():
    assert report(of(Unavailable("transport nccl moves CUDA tensors"))) == (
        "shardwise: error: transport nccl moves CUDA tensors"
    )


def test_an_input_error_is_one_sentence_unless_debugging():
    found = of(ValueError("prompt 0 has 9000 tokens"))
    assert report(found) == "shardwise: error: prompt 0 has 9000 tokens"
    assert "Traceback" not in report(found) and "ValueError: prompt 0" in report(found, debug=True)


def test_the_command_that_explains_a_report_may_be_pasted(tmp_path):
    path = tmp_path / "my logs" / "failure.json"
    assert f"report: {path} (shardwise explain '{path}')" in report(failure(0, 1), path=path)


def torchruns_report(*exits: tuple[int, int]) -> str:
    """Ranks and exit codes as torchrun prints them, the root cause last."""
    entries = [f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: 5)" for rank, code in exits]
    return "Failures:\n" + "\n".join(entries[:-1]) + "\nRoot Cause (first observed failure):\n" + entries[-1]


@pytest.mark.parametrize(
    "exits, blamed",
    [
        ([(0, 1)], {0: 1}),
        ([(0, -6), (1, 5)], {1: 5}),
        ([(1, -9), (0, -15)], {1: -9}),  # rank 0 had reported that rank 1 was gone, then torchrun ended it
        ([(1, -15), (0, -15)], {0: -15}),
    ],
)
def test_of_torchruns_report_the_rank_counts_that_torchrun_did_not_end(exits, blamed):
    assert Torchrun().blame(torchruns_report(*exits)) == blamed
    assert Torchrun().blame("Signal 15 (SIGTERM) received by PID 7") == {}
