"""Ranks under the user's own launcher that fail, or are ended, at nearly the same moment."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from shardwise.comm.base import CollectiveTimeout
from shardwise.comm.rank import RankInfo
from shardwise.launch import failure as failures
from shardwise.launch import guard, neighbours
from shardwise.launch.failure import Failure
from shardwise.launch.guard import Guard
from shardwise.launch.neighbours import Neighbours


@pytest.fixture(autouse=True)
def end_as_exception(monkeypatch):
    monkeypatch.setattr(guard, "end_job", sys.exit)


def own(rank: int, folder) -> Guard:
    return Guard(RankInfo(rank, 2, rank, 2, source="torchrun"), folder)


def failed(rank: int, what: str = "ValueError: on purpose", **changes) -> Failure:
    values = {"world": 2, "host": "node", "pid": 7, "phase": "run", "exit_code": 1, "time_ns": time.time_ns()}
    return Failure(rank=rank, what=what, **{**values, **changes})


def test_two_ranks_that_write_at_once_leave_one_report_of_both(tmp_path, monkeypatch):
    """The victim has read the folder before the cause stood there, and writes what it read after it."""
    replace, cause = failures._replace, failed(1, "KeyError: 'x'")

    def interrupted(path, data):
        if path.name == "failure.json":
            monkeypatch.setattr(failures, "_replace", replace)
            failures.write(tmp_path, cause)
        return replace(path, data)

    monkeypatch.setattr(failures, "_replace", interrupted)
    path = failures.write(tmp_path, failed(0, "PeerLost: gone", victim=True))
    stored = json.loads(path.read_text())
    assert (path.name, stored["rank"], [each["rank"] for each in stored["victims"]]) == ("failure.json", 1, [0])


def test_what_rank_0_says_for_all_is_said_before_others_can_read_it(tmp_path, monkeypatch, capsys):
    written, write = [], failures.write

    def slowly(*arguments):
        written.append(capsys.readouterr().err)
        return write(*arguments)

    monkeypatch.setattr(failures, "write", slowly)
    with pytest.raises(SystemExit):
        own(0, tmp_path).fail(ValueError("on purpose"))
    assert written == ["shardwise: error: on purpose\n"] and capsys.readouterr().err == ""


class Clock:
    """Moves by sleeps; at second 1.0 rank 0 fails too."""

    time_ns = staticmethod(time.time_ns)

    def __init__(self, folder):
        self.folder, self.now = folder, 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        if self.now < 1.0 <= self.now + seconds:
            failures.write(self.folder, failed(0))
        self.now += seconds


def test_a_rank_that_fails_like_a_slower_rank_0_leaves_the_word_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "time", Clock(tmp_path))
    with pytest.raises(SystemExit):
        own(1, tmp_path).fail(ValueError("on purpose"))
    assert capsys.readouterr().err == ""


def test_what_rank_0_of_an_earlier_job_said_is_said_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "ECHO_PAUSE", 0.01)
    failures.write(tmp_path, failed(0, time_ns=1))
    with pytest.raises(SystemExit):
        own(1, tmp_path).fail(ValueError("on purpose"))
    assert "shardwise: error: on purpose" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, tracebacks",
    [(CollectiveTimeout("rendezvous: rank(s) 1 did not arrive within 3 s", (1,)), 0), (RuntimeError("boom"), 1)],
    ids=["deadline", "bug"],
)
@pytest.mark.parametrize("debug", [False, True])
def test_a_wait_in_vain_is_a_sentence_that_names_the_missing_and_a_bug_shows_where(
    tmp_path, monkeypatch, capsys, error, tracebacks, debug
):
    monkeypatch.setattr(guard, "VICTIM_PAUSE", 0.0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "torchrun" / "error.json"))
    with pytest.raises(SystemExit):
        Guard(RankInfo(0, 2, 0, 2, source="torchrun"), tmp_path, debug=debug).run(raising(error))
    said = capsys.readouterr().err
    assert said.count("Traceback") == max(tracebacks, debug)
    assert "shardwise: rank 0 of 2 failed" in said and str(error) in said
    told = json.loads((tmp_path / "torchrun" / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert told.count("Traceback") == tracebacks and str(error) in told
    assert "Traceback" in json.loads((tmp_path / "failure.json").read_text())["trace"]


def raising(error):
    def body():
        raise error

    return body


def test_a_rank_is_not_seen_before_it_can_tell_sigterm_from_its_death(tmp_path, monkeypatch):
    seen, handler = {}, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(neighbours.signal, "signal", lambda *_: seen.update(handler=[*tmp_path.iterdir()]))
    monkeypatch.setattr(neighbours.signal, "set_wakeup_fd", lambda fd, **_: seen.update(pipe=fd))
    monkeypatch.setattr(neighbours.threading.Thread, "start", lambda thread: seen.update(reader=thread._args[0]))
    Neighbours(own(0, tmp_path)).join()
    assert seen["handler"] == [] and [path.name for path in tmp_path.iterdir()] == ["rank-0.pid"]
    for descriptor in (seen["reader"], seen["pipe"]):
        os.close(descriptor)
    assert signal.getsignal(signal.SIGTERM) is handler, "the test's own is not touched"


def test_of_ranks_that_wait_in_vain_the_first_one_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "VICTIM_PAUSE", 0.0)
    waited = CollectiveTimeout("rank(s) 2 did not arrive", (2,))
    for rank in (1, 0):
        with pytest.raises(SystemExit, match="124"):
            own(rank, tmp_path).fail(waited)
    assert capsys.readouterr().err.count("did not arrive") == 1


def test_a_rank_that_ended_with_a_word_is_not_told_again(tmp_path, capsys):
    process = subprocess.Popen([sys.executable, "-c", ""])
    pidfd, path = os.pidfd_open(process.pid), tmp_path / "rank-1.pid"
    process.wait()
    for words in ([], [failed(1, "CollectiveTimeout: rank(s) 2 did not arrive", victim=True)]):
        path.write_text(json.dumps([process.pid, 1]))
        for each in words:
            failures.write(tmp_path, each)
        Neighbours(own(0, tmp_path))._tell(path, pidfd)
        assert ("rank 1 of 2 failed" in capsys.readouterr().err) is not bool(words)
        (tmp_path / "failure-rank-1.json").unlink()
    os.close(pidfd)
