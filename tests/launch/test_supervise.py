"""What a supervisor makes of ends, words and signals that come at the same moment, by ranks that only speak."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from shardwise.comm.watch import Deadlines, process_start
from shardwise.launch import supervise
from shardwise.launch.backend import Backend
from shardwise.launch.job import Job, JobFailed
from shardwise.launch.ray import Ray
from shardwise.launch.supervise import Supervisor


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_LOG_DIR", str(tmp_path / "logs"))


class Rank:
    """Speaks as a rank does; `host` tells whether the supervisor may watch and end it."""

    def __init__(self, job: Job, address: str, rank: int, host: str = "elsewhere", pid: int = 1, started: int = 1):
        self.line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.line.connect(address)
        self.ended = os.eventfd(0)
        self.say("hello", token=job.token, rank=rank, pid=pid, started=started, host=host)

    def say(self, event: str, **values) -> None:
        self.line.sendall(json.dumps({"event": event, **values}).encode() + b"\n")


class Speakers(Backend):
    """Two ranks that end when the test says so."""

    name = "speakers"

    def __init__(self, **identity):
        self.identity = identity
        self.ranks: list[Rank] = []
        self.over = False

    def prepare(self, job):
        pass

    def start(self, job, description):
        self.ranks = [Rank(job, description["address"], rank, **self.identity) for rank in range(2)]

    def sentinels(self):
        return [rank.ended for rank in self.ranks]

    def exits(self):
        return {0: 0, 1: 0} if self.over else {}

    def running(self):
        return not self.over

    def signal(self, signum):
        self.over = True

    def close(self):
        for rank in self.ranks:
            rank.line.close()
            os.close(rank.ended)
        self.ranks.clear()


class EndsWhenAsked(Speakers):
    """Rank 1 says that it is done, and ends, while the supervisor, which has read all so far, asks who has ended."""

    def start(self, job, description):
        super().start(job, description)
        self.ranks[0].say("done", value="a")
        os.eventfd_write(self.ranks[0].ended, 1)

    def exits(self):
        if not self.over:
            self.ranks[1].say("done", value="b")
            os.eventfd_write(self.ranks[1].ended, 1)
            self.over = True
        return super().exits()


def job(**deadlines: float) -> Job:
    return Job(target="a:b", payload={}, world=2, deadlines=Deadlines(stop=0.1, **deadlines))


def test_a_rank_that_ends_well_while_another_ones_end_is_looked_at_has_not_failed():
    with Supervisor(job(), EndsWhenAsked()) as supervisor:
        assert supervisor.finish() == ["a", "b"]


class DiesWhenAsked(EndsWhenAsked):
    """Rank 1 dies without a word, on a host that nobody watches, while the supervisor asks who has ended."""

    died = False

    def exits(self):
        known = {0: 0, 1: -9} if self.died else {0: 0}
        if not self.died:
            self.ranks[1].line.close()
            os.eventfd_write(self.ranks[1].ended, 1)
            self.died = True
        return known

    def running(self):
        """As where a third rank is at work: until all are told to end."""
        return not self.over


def test_a_rank_that_dies_while_another_ones_end_is_looked_at_is_not_overlooked():
    with Supervisor(job(), DiesWhenAsked()) as supervisor:
        with pytest.raises(JobFailed, match="rank 1 of 2 failed .* killed by SIGKILL"):
            supervisor.finish(deadline=60)


class EndsAhead(Speakers):
    """What rank 1 says last is still under way when its launcher, over another line, says that it has ended."""

    def start(self, job, description):
        super().start(job, description)
        self.ranks[0].say("done", value="a")
        os.eventfd_write(self.ranks[1].ended, 1)

    def exits(self):
        return {1: 0}

    def running(self):
        return not self.over


def test_an_end_that_is_told_ahead_of_the_ranks_last_words_waits_for_them(monkeypatch):
    with Supervisor(job(), EndsAhead()) as supervisor:
        rank, look, told = supervisor.backend.ranks[1], supervisor._ended_process, []

        def look_then_hear(*end):
            look(*end)
            told.append(end)
            rank.say("token", text="last")
            rank.say("done", value="b")
            rank.line.close()
            supervisor.backend.over = True

        monkeypatch.setattr(supervisor, "_ended_process", look_then_hear)
        events = []
        assert supervisor.finish(events.append) == ["a", "b"]
        assert len(told) == 1 and [event["text"] for event in events] == ["last"]


def test_last_words_of_a_rank_whose_host_is_gone_too_are_not_awaited_for_ever(monkeypatch):
    monkeypatch.setattr(supervise, "LAST_WORDS", 0.05)
    with Supervisor(job(), EndsAhead()) as supervisor:
        with pytest.raises(JobFailed, match="rank 1 of 2 failed .* ended before its work was done, with exit code 0"):
            supervisor.finish(deadline=60)


def test_what_has_come_counts_however_late_the_parent_looks():
    with Supervisor(job(start=1e-9), Speakers()) as supervisor:
        supervisor.wait_for_ranks()
        for rank in supervisor.backend.ranks:
            rank.say("done", value=7)
        assert supervisor.finish(deadline=1e-9) == [7, 7]


def test_a_silence_is_told_by_its_deadline_wherever_in_it_the_last_word_came():
    with Supervisor(job(), Speakers()) as supervisor:
        supervisor.wait_for_ranks()
        supervisor.backend.ranks[0].say("done", value=7)
        with pytest.raises(JobFailed, match=r"the parent waited 0.25 s in vain for the job to end"):
            supervisor.finish(deadline=0.25)


def test_a_rank_that_ends_before_it_shows_its_stack_keeps_nobody_from_the_report(monkeypatch):
    def gone(pid, signum):
        assert (pid, signum) == (10**9, signal.SIGUSR2)
        raise ProcessLookupError

    here = {"host": socket.gethostname(), "pid": 10**9}
    with Supervisor(job(), Speakers(**here)) as supervisor:
        supervisor.wait_for_ranks()
        with monkeypatch.context() as patch:
            patch.setattr(supervise.watch, "process_alive", lambda pid, started: not supervisor.backend.over)
            patch.setattr(supervise.os, "kill", gone)
            with pytest.raises(JobFailed, match="the parent waited 0.05 s in vain for a word"):
                supervisor.next_events(0.05, "a word")


SLOW = """
import signal, time
def show(signum, frame):
    time.sleep(0.6)
    print("stack of mine", flush=True)
signal.signal(signal.SIGUSR2, show)
print("ready", flush=True)
while True:
    signal.pause()
"""


class SlowToShow(Speakers):
    """Both are one process, whose log is that of rank 0."""

    def start(self, job, description):
        with open(job.log(0), "wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=log)
        while job.log(0).read_bytes() != b"ready\n":
            time.sleep(0.01)
        pid = self.process.pid
        self.identity = {"host": socket.gethostname(), "pid": pid, "started": process_start(pid)}
        super().start(job, description)


def test_a_rank_that_is_slow_to_show_its_stack_is_waited_for():
    with Supervisor(job(), SlowToShow()) as supervisor:
        supervisor.wait_for_ranks()
        with pytest.raises(JobFailed) as caught:
            supervisor.next_events(0.05, "a word")
    assert "stack of mine" in caught.value.failure.trace
    assert supervisor.backend.process.wait(60) == -signal.SIGKILL


def test_under_ray_every_end_is_heard_of_not_the_first_alone():
    """Of ranks on other hosts nobody else tells."""

    class Library:
        class exceptions:
            RayActorError = RayError = RuntimeError

        def wait(self, refs, num_returns, timeout):
            return refs[:1], refs[1:]

        def get(self, ref):
            return None

    backend = Ray()
    backend._ends = [os.eventfd(0) for _ in range(2)]
    backend._watch(Library(), {"first": 0, "second": 1})
    assert [os.eventfd_read(descriptor) for descriptor in backend.sentinels()] == [1, 1]
    assert backend.exits() == {0: 0, 1: 0}
    backend.close()
