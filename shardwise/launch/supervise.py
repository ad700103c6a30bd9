"""The parent of a job: hears its ranks, sees them die, names the cause, and leaves nobody behind.

Ranks report over the link before they load anything; from then on their pids are watched, whoever started them. At
the first sign of trouble the supervisor waits shortly for what the others have to say, ends everything it started,
and raises `JobFailed` with the cause.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from shardwise.comm import watch
from shardwise.launch import failure as failures
from shardwise.launch import postmortem
from shardwise.launch.backend import Backend
from shardwise.launch.exit_status import exit_code
from shardwise.launch.failure import Failure
from shardwise.launch.job import Job, JobFailed
from shardwise.launch.link import Hub

SETTLE = 0.2
"""Seconds to hear of failures that came before the first one we heard of."""
VERDICT = 15.0
"""Seconds that a launcher gets to end by itself and say who died; torchrun needs 1 to 3, more on a busy machine."""
LAST_WORDS = 15.0
"""Seconds that words of a rank on another host may be under way when its launcher says that it has ended: TCP sends
lost ones anew after 0.2, 0.4, 0.8 ... seconds. Its line ends behind them, unless that host is gone too."""
DUMP, QUIET = 3.0, 0.1
"""Seconds that a rank that hangs gets to write its stacks; a log that has grown and then rests for QUIET has them."""


class Supervisor:
    """Context manager around a running job. Commands go out with `send`, events come in by `next_events`."""

    def __init__(self, job: Job, backend: Backend):
        self.job = job
        self.backend = backend
        self.phases = {rank: "start" for rank in range(job.world)}
        self.results: dict[int, Any] = {}
        self._failed: dict[int, Failure] = {}
        self._died: dict[int, int] = {}
        self._gone: dict[int, float] = {}
        """When, on the monotonic clock, each rank was heard to have ended."""
        self._pidfds: dict[int, int] = {}
        self._trouble: float | None = None
        self._kills = postmortem.out_of_memory_kills()
        self._hub: Hub | None = None
        self._store: dict | None = None
        self._early: list[dict] = []
        self._ended = False

    def __enter__(self) -> "Supervisor":
        try:
            self.backend.prepare(self.job)
            self.job.prepare()
            self._hub = Hub(self.job.folder, self.job.token, self.backend.tcp_host)
            description = self.job.describe(self._hub.address)
            self.job.write(description)
            self.backend.start(self.job, description)
            for sentinel in self.backend.sentinels():
                self._hub.watch(sentinel)
            return self
        except BaseException:
            self.abort()
            raise

    def stop(self) -> None:
        """Ask the ranks to end by themselves, which frees what they share; end them if they do not."""
        if not self._ended:
            self.send({"command": "stop"})
            self.backend.wait(self.job.deadlines.stop)
            self._end()
            self._release(failed=False)

    def abort(self) -> None:
        """End everything at once, busy or not."""
        if not self._ended:
            self._end()
            self._release(failed=False)

    def __exit__(self, kind, error, trace) -> None:
        self.abort()

    @property
    def ended(self) -> bool:
        """Whether the job is over, well or not."""
        return self._ended

    @property
    def hub(self) -> Hub:
        assert self._hub is not None, "the job was not started"
        return self._hub

    def send(self, command: dict) -> None:
        """The same command to every rank."""
        self.hub.send(command)

    def wait_for_ranks(self) -> None:
        """Until every rank has reported; `Deadlines.start` bounds it."""
        begun = time.monotonic()
        early = []
        while len(self.hub.hello) < self.job.world:
            early += self.next_events(self.job.deadlines.start, "a rank to report", begun)
        self._early = early

    def finish(self, on_event: Callable[[dict], None] = lambda event: None, deadline: float | None = None) -> list[Any]:
        """Until every rank's function has returned and every process has ended; the results by rank."""
        self.wait_for_ranks()
        begun = time.monotonic()
        while len(self.results) < self.job.world:
            for event in self.next_events(deadline or None, "the job to end", begun):
                on_event(event)
        self.backend.wait(self.job.deadlines.stop)
        self._end()
        self._release(failed=False)
        return [self.results[rank] for rank in range(self.job.world)]

    def next_events(self, seconds: float | None, waiting_for: str, begun: float | None = None) -> list[dict]:
        """The next events of the ranks' own. Raises JobFailed for a failure, or after `seconds` without any event.

        begun  when the wait began, on the monotonic clock; None: now
        May be empty when only the supervisor's own bookkeeping moved on. What has come is taken, however late.
        """
        if self._early:
            early, self._early = self._early, []
            return early
        begun = time.monotonic() if begun is None else begun
        while True:
            left = 3600.0 if seconds is None else begun + seconds - time.monotonic()
            before = len(self.hub.hello) + len(self.results)
            events = self._take(left)
            if self._trouble is not None:
                self._collapse()
            if events or len(self.hub.hello) + len(self.results) != before:
                return events
            if seconds is not None and left <= 0:
                self._stalled(seconds, waiting_for)

    def _take(self, seconds: float) -> list[dict]:
        """Wait once; book what concerns the supervisor, return the rest."""
        patience = [until - time.monotonic() for until in self._words_under_way().values()]
        events, woken = self.hub.wait(max(0.0, min([seconds, *patience])))
        exits: dict[int, int | None] = {}
        running = True
        if woken:  # asked before the last look at the line: what a rank of this host said before it ended is there
            exits, running = self.backend.exits(), self.backend.running()
            events += self.hub.wait(0.0)[0]  # who wakes us only now is left to the next look
        rest = []
        for event in events:
            kind, rank = event["event"], event["rank"]
            if kind == "hello":
                self._watch(rank)
                self._announce_store()
            elif kind == "phase":
                self.phases[rank] = event["phase"]
            elif kind == "failed":
                self._failed[rank] = Failure.from_json(event["failure"])
                self._trouble = self._trouble or time.monotonic()
            elif kind == "store":
                self._store = {"command": "store", "host": event["host"], "port": event["port"]}
                self._announce_store()
            elif kind == "done":
                self.results[rank] = event["value"]
            else:
                rest.append(event)
        for descriptor in woken:
            self._ended_process(descriptor, exits, running)
        if self._gone.keys() - self.results.keys() - self._words_under_way().keys():
            self._trouble = self._trouble or time.monotonic()
        return rest

    def _words_under_way(self) -> dict[int, float]:
        """Ranks that have ended and may have said more than has come, with the moment until which that is awaited."""
        far = self._gone.keys() - self.results.keys() - set(self._pidfds.values())
        until = {rank: self._gone[rank] + LAST_WORDS for rank in far if self.hub.hears(rank)}
        return {rank: end for rank, end in until.items() if time.monotonic() < end}

    def _announce_store(self) -> None:
        """Where rank 0 serves the rendezvous, to all ranks, once all of them are there to hear it."""
        if self._store and len(self.hub.hello) == self.job.world:
            self.send(self._store)
            self._store = None

    def _watch(self, rank: int) -> None:
        hello = self.hub.hello[rank]
        if hello.host != socket.gethostname():
            return
        try:
            descriptor = os.pidfd_open(hello.pid)
        except ProcessLookupError:  # gone already; its launcher's sentinel tells
            return
        self._pidfds[descriptor] = rank
        self.hub.watch(descriptor)

    def _ended_process(self, descriptor: int, exits: dict[int, int | None], running: bool) -> None:
        """`exits` and `running` are the backend's, from before the events that are booked were read."""
        self.hub.forget(descriptor)
        rank = self._pidfds.get(descriptor)
        if rank is not None:
            self._died.setdefault(rank, time.time_ns())
        dead = [rank] if rank is not None else exits if running else range(self.job.world)
        for each in dead:
            self._gone.setdefault(each, time.monotonic())

    def _collapse(self) -> None:
        """Hear the others out, end everything, raise the cause."""
        assert self._trouble is not None
        while not self._settled(time.monotonic() - self._trouble):
            self._take(0.05)
        stacks = self._stacks_of_missing()
        died = dict(self._died)  # without those that we end now
        for rank in self.backend.exits():  # of a rank that never reported, only its launcher knows
            died.setdefault(rank, time.time_ns())
        self._end()
        self._take(0.0)
        told = {rank: exit_code(pidfd) for pidfd, rank in self._pidfds.items() if rank in died}
        found = postmortem.failures(
            self.job,
            self.backend,
            self.hub.hello,
            self.phases,
            reported={**{each.rank: each for each in failures.read_all(self.job.logs)}, **self._failed},
            died=died,
            told=told,
            finished=set(self.results),
            stacks=stacks,
            out_of_memory=postmortem.out_of_memory_kills() > self._kills,
        )
        self._raise(found)

    def _settled(self, seconds: float) -> bool:
        if not self.backend.running():
            return True
        causes = [each for each in self._failed.values() if not each.victim or each.missing]
        if causes or (self.backend.exits().keys() - self.results.keys()):
            return seconds > SETTLE
        return seconds > VERDICT

    def _stalled(self, seconds: float, waiting_for: str) -> None:
        """Nothing came for too long: every rank shows its stacks, the one that is furthest behind is named."""
        late = [rank for rank in range(self.job.world) if rank not in self.hub.hello]
        late = late or [rank for rank in range(self.job.world) if rank not in self.results]
        stacks = self._dump_stacks(late)
        self._end()
        self._raise(postmortem.stall(self.job, self.hub.hello, self.phases, late, stacks, seconds, waiting_for))

    def _stacks_of_missing(self) -> dict[int, str]:
        missing = {rank for each in self._failed.values() for rank in each.missing}
        return self._dump_stacks(sorted(missing - self._failed.keys() - self._died.keys()))

    def _dump_stacks(self, ranks: list[int]) -> dict[int, str]:
        """What each rank is doing, from its log; {} for ranks that cannot be asked."""
        lengths = {}
        for rank in ranks:
            hello = self.hub.hello.get(rank)
            if hello and hello.host == socket.gethostname() and watch.process_alive(hello.pid, hello.started):
                length = postmortem.size(self.job.log(rank))
                with contextlib.suppress(ProcessLookupError):  # it has just ended, and has no stacks
                    os.kill(hello.pid, signal.SIGUSR2)
                    lengths[rank] = length
        self._await_growth({rank: length for rank, length in lengths.items() if self.job.log(rank).exists()})
        return {rank: postmortem.tail(self.job.log(rank), start=length) for rank, length in lengths.items()}

    def _await_growth(self, lengths: dict[int, int]) -> None:
        """Until these ranks' logs are longer, and rest; for DUMP seconds at most."""
        end = time.monotonic() + DUMP
        before: dict[int, int] = {}
        sizes = lengths
        while time.monotonic() < end and (before != sizes or any(sizes[rank] <= lengths[rank] for rank in lengths)):
            time.sleep(QUIET)
            before, sizes = sizes, {rank: postmortem.size(self.job.log(rank)) for rank in lengths}

    def _raise(self, found: list[Failure]) -> None:
        path = None
        for each in found:
            path = failures.write(self.job.logs, each)
        cause = failures.primary(found)
        assert cause is not None
        text = failures.report(cause, path=path, debug=self.job.debug)
        self._release(failed=True)
        raise JobFailed(text, cause, path)

    def _end(self) -> None:
        """End what was started: ask, wait, kill. Ranks are hit only while (pid, start time) is still theirs."""
        if self.backend.running():
            self.backend.signal(signal.SIGTERM)
            if not self.backend.wait(self.job.deadlines.stop):
                self.backend.signal(signal.SIGKILL)
                self.backend.wait(self.job.deadlines.stop)
        for hello in self.hub.hello.values() if self._hub else ():
            if hello.host == socket.gethostname() and watch.process_alive(hello.pid, hello.started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(hello.pid, signal.SIGKILL)

    def _release(self, failed: bool) -> None:
        self._ended = True
        for descriptor in self._pidfds:
            os.close(descriptor)
        self._pidfds.clear()
        if self._hub is not None:
            self._hub.close()
        self.backend.close()
        self.job.clean(failed)
