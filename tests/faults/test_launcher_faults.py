"""What a user sees when a rank fails: the right rank is named, its exit code is kept, nobody is left behind."""

import signal
import socket
import threading

import pytest
from fault_jobs import HERE, fail, job_environment, start_parent, survivors

from shardwise.launch.start import run_job

LAUNCHERS = ("local", "torchrun", "mpi")
BOUND = {"local": 10.0, "torchrun": 30.0, "mpi": 15.0}
"""Seconds from the failure to the end of the job; the other rank is busy for 100."""
FAULTS = [
    ("raise", 1, "RuntimeError: boom on purpose"),
    ("sys.exit", 3, "SystemExit(3)"),
    ("os._exit", 5, "ended with exit code 5"),
    ("SIGKILL", 128 + signal.SIGKILL, "killed by SIGKILL"),
    ("SIGSEGV", 128 + signal.SIGSEGV, "killed by SIGSEGV"),
]


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_LOG_DIR", str(tmp_path / "logs"))
    return tmp_path / "logs"


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("fault, code, what", FAULTS, ids=[fault for fault, _, _ in FAULTS])
def test_the_rank_that_failed_is_named_with_its_exit_code(tmp_path, logs, launcher, fault, code, what):
    failed = fail(tmp_path, launcher, "crash", {"fault": fault})
    assert (failed.failure.rank, failed.failure.what) == (1, what)
    assert failed.error.exit_code == code
    assert failed.survivors == []
    assert failed.seconds < BOUND[launcher]
    assert "rank 1 of 2 failed" in str(failed.error) and "while run" in str(failed.error)
    assert failed.file["rank"] == 1 and failed.file["host"] == socket.gethostname()
    assert failed.file["phase"] == "run" and failed.file["pid"] > 1
    assert (logs / "rank-0.log").exists() and (logs / "rank-1.log").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_is_killed_before_it_reports_is_named(tmp_path, launcher):
    names = ("SHARDWISE_RANK", "RANK", "OMPI_COMM_WORLD_RANK")
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif '1' in map(os.environ.get, {names}):\n    os.kill(os.getpid(), {signal.SIGKILL:d})\n"
    )
    failed = fail(tmp_path, launcher, "crash", {"fault": "raise"}, PYTHONPATH=f"{tmp_path}:{HERE.parents[1]}:{HERE}")
    assert (failed.failure.rank, failed.failure.what) == (1, "killed by SIGKILL")
    assert failed.error.exit_code == 137 and failed.failure.phase == "start"
    assert failed.survivors == [] and failed.seconds < BOUND[launcher]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_fault_before_the_rendezvous_ends_those_who_wait(tmp_path, launcher):
    failed = fail(tmp_path, launcher, "absent_from_rendezvous")
    assert (failed.failure.rank, failed.failure.what) == (1, "RuntimeError: no device for this rank")
    assert failed.survivors == [] and failed.seconds < BOUND[launcher]


@pytest.mark.alone
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_never_enters_a_collective_is_named_with_its_stack(tmp_path, monkeypatch, launcher):
    monkeypatch.setenv("SHARDWISE_DEADLINE_COLLECTIVE", "1")
    failed = fail(tmp_path, launcher, "skip_collective")
    assert failed.failure.rank == 1 and failed.error.exit_code == 124
    assert "all_reduce" in failed.failure.what
    assert "forget_to_come" in (failed.failure.trace or "")
    assert [victim.rank for victim in failed.failure.victims] == [0]
    assert failed.survivors == [] and failed.seconds < BOUND[launcher] + 10


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_cause_is_told_from_its_victim_that_complains_first(tmp_path, launcher):
    failed = fail(tmp_path, launcher, "drag_down")
    assert (failed.failure.rank, failed.failure.what) == (1, "KeyError: 'the cause'")
    assert [victim.what for victim in failed.failure.victims] == ["ConnectionError: connection closed by peer"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_nobody_survives_the_parent(tmp_path, monkeypatch, launcher, signum):
    mark = str(tmp_path)
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    parent = start_parent(mark, launcher, "talk", tmp_path / "logs")
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    assert len(survivors(mark, patience=0)) >= 3
    parent.send_signal(signum)
    code = parent.wait(60)
    assert code == (128 + signum if signum == signal.SIGTERM else -signum)
    assert survivors(mark, patience=5) == []
    assert signum == signal.SIGKILL or list(temporary.iterdir()) == []


def test_two_jobs_at_once_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.delenv("SHARDWISE_LOG_DIR")
    outcomes: dict[str, object] = {}

    def healthy():
        environment = job_environment(str(tmp_path))
        outcomes["healthy"] = run_job("fault_bodies:nap", {"name": "a"}, world=2, environment=environment)

    def doomed():
        outcomes["doomed"] = fail(tmp_path, "local", "crash", {"fault": "os._exit"})

    jobs = [threading.Thread(target=healthy), threading.Thread(target=doomed)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert outcomes["healthy"] == ["a", "a"]
    assert outcomes["doomed"].failure.what == "ended with exit code 5"


def test_ten_megabytes_on_stderr_do_not_block_the_report(tmp_path):
    failed = fail(tmp_path, "local", "noisy")
    assert (failed.failure.rank, failed.error.exit_code) == (1, 7)
    assert len(str(failed.error)) < 2000


def test_a_job_that_is_silent_beyond_its_deadline_shows_where_everyone_is(tmp_path):
    with pytest.raises(Exception, match=r"waited 2 s in vain .*rank 0: run, rank 1: run") as caught:
        run_job("fault_bodies:wait", world=2, environment=job_environment(str(tmp_path)), deadline=2)
    assert caught.value.exit_code == 124
    assert "fault_bodies.py" in (caught.value.failure.trace or "")
    assert survivors(str(tmp_path)) == []


def test_variables_of_another_launcher_around_us_do_not_reach_the_ranks(tmp_path, monkeypatch):
    for name, value in {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_ID": "0",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "6",
    }.items():
        monkeypatch.setenv(name, value)
    for launcher in ("local", "mpi"):
        got = run_job("fault_bodies:echo", world=2, launcher=launcher, environment=job_environment(str(tmp_path)))
        assert [(each["rank"], each["world"]) for each in got] == [(0, 2), (1, 2)]
