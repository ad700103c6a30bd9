"""Failures under Ray: the dead actor is named, not the one whose error Ray would show first."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_jobs import fail, job_environment, kernel_tells, start_parent, survivors

from shardwise import LLM, SamplingParams
from shardwise.launch.cli import main
from shardwise.launch.job import JobFailed
from shardwise.launch.start import run_job

ray = pytest.importorskip("ray")

KILLED = (137, "killed by SIGKILL") if kernel_tells() else (1, "its process died; the launcher does not know of what")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One small cluster for all tests of this file; the launcher uses the connection that it finds."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_LOG_DIR", str(tmp_path / "logs"))


def test_results_come_back_by_rank_and_the_connection_stays_open(tmp_path):
    got = run_job("fault_bodies:echo", {"a": 1}, world=2, launcher="ray", environment=job_environment(str(tmp_path)))
    assert [(each["rank"], each["world"], each["source"]) for each in got] == [(0, 2, "Ray"), (1, 2, "Ray")]
    assert ray.is_initialized()


@pytest.mark.parametrize(
    "fault, code, what",
    [
        ("raise", 1, "RuntimeError: boom on purpose"),
        ("sys.exit", 3, "SystemExit(3)"),
        ("SIGKILL", *KILLED),
    ],
)
def test_the_rank_that_failed_is_named(tmp_path, fault, code, what):
    failed = fail(tmp_path, "ray", "crash", {"fault": fault})
    assert (failed.failure.rank, failed.failure.what, failed.error.exit_code) == (1, what, code)
    assert failed.file["phase"] == "run" and failed.file["pid"] > 1
    assert failed.survivors == [] and failed.seconds < 20


def test_an_actor_that_is_killed_amid_collectives_ends_the_job_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr("shardwise.launch.supervise.SETTLE", 1.0)  # else a victim may be ended before it speaks
    failed = fail(tmp_path, "ray", "killed_amid_collectives")
    assert (failed.failure.rank, failed.error.exit_code, failed.failure.what) == (1, *KILLED)
    assert [victim.what.split(":")[0] for victim in failed.failure.victims] == ["PeerLost"]
    assert failed.survivors == [] and failed.seconds < 20


def test_an_actor_that_is_killed_while_it_generates_ends_the_call_within_seconds():
    with LLM("smollm2", tp=2, launcher="ray", weights="native") as llm:
        stream = llm.stream("Once", SamplingParams(max_new_tokens=4000, ignore_eos=True))
        next(stream)
        os.kill(llm._executor._supervisor.hub.hello[1].pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(JobFailed, match="rank 1 of 2 failed .* while run: ") as failed:
            list(stream)
        assert time.monotonic() - killed < 20  # the other tokens take minutes
        assert (failed.value.exit_code, failed.value.failure.what) == KILLED
        with pytest.raises(RuntimeError, match="the ranks of this LLM have ended, after a failure"):
            llm.generate("Twice")


@pytest.mark.alone
def test_a_cluster_that_is_too_small_is_explained_within_ten_seconds(tmp_path):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"too little for 5 ranks: wanted 5 CPU, free .* CPU \(nodes: .*: 2 CPU\)"):
        run_job("fault_bodies:echo", world=5, launcher="ray", environment=job_environment(str(tmp_path)))
    assert time.monotonic() - started < 10


def test_a_cluster_that_is_too_small_is_one_sentence_for_the_command_line(capfd):
    assert main(["run", "smollm2", "--tp", "3", "--launcher", "ray"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("shardwise: error: the Ray cluster has too little for 3 ranks") and err.count("\n") == 1
    assert err.endswith("use fewer ranks or a larger cluster\n")


def test_no_rank_survives_a_killed_driver(tmp_path):
    """Ranks go at once; two agents of the driver's own Ray node take a minute to notice, which is Ray's affair."""
    mark = str(tmp_path)
    parent = start_parent(mark, "ray", "talk", tmp_path / "logs")
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGKILL)
    assert parent.wait(60) == -signal.SIGKILL
    end = time.monotonic() + 10
    while (
        ranks := [pid for pid in survivors(mark, patience=0) if "RankActor" in command(pid)]
    ) and time.monotonic() < end:
        time.sleep(0.1)
    assert ranks == []


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_missing_ray_is_named_with_its_remedy():
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from shardwise.launch.cli import main\n"
        "sys.exit(main(['run', 'smollm2', '--tp', '2', '--launcher', 'ray']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr == "shardwise: error: the package ray is not installed: pip install ray\n"
