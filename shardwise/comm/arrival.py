"""How MPI ranks wait for each other before a blocking call: with a deadline, and naming who is missing.

On one host through a page of shared memory (about a microsecond, and it sees dead processes and aborts); across
hosts through MPI's own non-blocking sum, with small messages for the roll call.
"""

import os
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from shardwise.comm import leaving
from shardwise.comm.bootstrap import Rendezvous
from shardwise.comm.control import FRAME_BYTES, framed, unframed
from shardwise.comm.segment import LONG_SLEEP, SHORT_SLEEP, YIELD_SECONDS, Segment, WaitFailed
from shardwise.comm.sharing import one_host, share
from shardwise.comm.watch import ROLL_CALL_SECONDS

LATE_TAG, ABORT_TAG, LEFT_TAG = 1, 2, 3
EMPTY_HALF = 64
"""Bytes of a half of a segment in which ranks only meet: nothing is written there."""


_owned: list = []


def owned(comm):
    """`comm`, which this package made and frees before MPI is finalised."""
    _owned.append(comm)
    return comm


def free(comm) -> None:
    """Give `comm` back now, where this package made it. Every rank of it does."""
    if comm in _owned:
        _owned.remove(comm)
        comm.Free()


def free_owned() -> None:
    """Give MPI's communicators back, the latest first. Every rank does so when it leaves MPI in good order."""
    while _owned:
        _owned.pop().Free()


class Arrivals(ABC):
    """Where the ranks of one MPI communicator meet."""

    @abstractmethod
    def meet(self, limit: float, call: int) -> None:
        """Return when all ranks are here. Raises WaitFailed after `limit` seconds, on an abort, for a dead rank, and
        where the numbers of what the ranks call differ."""

    @abstractmethod
    def calls(self, mine: bytes, limit: float) -> list[bytes]:
        """What all ranks called, in words, after a meeting that failed for the difference."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End all present and later meetings of all ranks."""

    @abstractmethod
    def close(self) -> None:
        """Come to no more meetings, and give back what MPI holds for them."""

    @abstractmethod
    def split(self, comm, members: Sequence[int]) -> "Arrivals":
        """For the sub-group `comm` of `members` (ranks here); called by all ranks."""


class SegmentArrivals(Arrivals):
    """Flags in shared memory."""

    def __init__(self, segment: Segment, gather: Callable[[str, Any], list]):
        self.segment = segment
        self.gather = gather

    @classmethod
    def try_make(cls, meeting: Rendezvous, limit: float) -> "SegmentArrivals | None":
        """None where the ranks cannot share memory (several hosts, other machines than x86-64, no memory left)."""

        def gather(key: str, value: Any) -> list:
            return meeting.gather(key, value, limit)

        if not one_host(meeting, limit)[0]:
            return None
        crowded = meeting.size > len(os.sched_getaffinity(0))
        members = list(range(meeting.size))
        try:
            segment = share(gather, members, meeting.rank, EMPTY_HALF, key="arrivals", crowded=crowded)
        except OSError:  # on every rank
            return None
        return cls(segment, gather)

    def meet(self, limit: float, call: int) -> None:
        if self.segment.root.words[0]:
            raise WaitFailed("aborted", (), self.segment.aborted or "")
        self.segment.round(limit, call)

    def calls(self, mine: bytes, limit: float) -> list[bytes]:
        return self.segment.calls(mine, limit)

    def abort(self, reason: str) -> None:
        self.segment.abort(reason)

    def close(self) -> None:
        self.segment.leave()

    def split(self, comm, members: Sequence[int]) -> "SegmentArrivals":
        segment = share(
            self.gather,
            list(members),
            list(members).index(self.segment.rank),
            EMPTY_HALF,
            key="arrivals",
            crowded=self.segment.spins == 0,
            root=self.segment.root,
        )
        return SegmentArrivals(segment, lambda key, value: comm.allgather(value))


class MessageArrivals(Arrivals):
    """A non-blocking sum on a duplicate of the communicator, and messages beside it."""

    def __init__(self, comm):
        self.comm = owned(comm.Dup())
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.count = 0
        self._answered = 0
        """The meeting of which this rank has said last that it waits there."""
        self._sent: list = []
        """Requests hold the memory that MPI may still read or write."""
        self._left: dict[int, int] = {}
        """Ranks that have left, with the number of meetings that they came to."""
        self.whole = True
        leaving.register(self)

    def meet(self, limit: float, call: int) -> None:
        self.count += 1
        shown, sums = array("q", [call, call * call]), array("q", [0, 0])
        self._await(self.comm.Iallreduce(shown, sums), limit)
        if sums[0] * sums[0] != sums[1] * self.size:  # equal exactly where all numbers are
            raise WaitFailed("differs", (), "called something else")

    def calls(self, mine: bytes, limit: float) -> list[bytes]:
        blob, joined = framed(mine), bytearray(FRAME_BYTES * self.size)
        self._await(self.comm.Iallgather(blob, joined), limit)
        return unframed(joined)

    def _await(self, request, limit: float) -> None:
        begin = time.monotonic()
        turns, waited = 0, 0.0
        while not request.Test():
            turns += 1
            if turns & 63 and waited <= YIELD_SECONDS:
                continue
            try:
                self._look(waited, limit)  # of the last turn: all may have come while this rank was not running
            except WaitFailed:
                self._sent.append(request)
                self.whole = False
                leaving.stay()
                raise
            waited = time.monotonic() - begin
            if waited > YIELD_SECONDS:  # as on one host: a rank that waits for long leaves its core to others
                time.sleep(SHORT_SLEEP if waited < 1 else LONG_SLEEP)
            else:
                os.sched_yield()

    def _look(self, waited: float, limit: float) -> None:
        if self.comm.Iprobe(tag=ABORT_TAG):
            raise WaitFailed("aborted", (), self.comm.recv(tag=ABORT_TAG))
        if self._answered != self.count and self.comm.Iprobe(tag=LATE_TAG):
            self._answer()
        leavers = tuple(peer for peer, count in self._all_left().items() if count < self.count)
        if leavers:
            raise WaitFailed("lost", leavers, "has closed the group or ended its program")
        if waited > limit:
            present = self._roll_call()
            missing = tuple(rank for rank in range(self.size) if rank not in present)
            raise WaitFailed("late", missing, f"did not arrive within {limit:g} s")

    def _roll_call(self) -> set[int]:
        """Who else waits at this meeting: they see that this rank asks, and say so."""
        if self._answered != self.count:
            self._answer()
        present = {self.rank}
        end = time.monotonic() + ROLL_CALL_SECONDS
        while time.monotonic() < end and len(present) < self.size:
            for peer in range(self.size):
                if self._waits(peer):
                    present.add(peer)
            time.sleep(0.005)
        return present

    def _answer(self) -> None:
        self._answered = self.count
        self._tell(LATE_TAG, self.count)

    def _waits(self, peer: int) -> bool:
        if peer == self.rank or not self.comm.Iprobe(source=peer, tag=LATE_TAG):
            return False
        return self.comm.recv(source=peer, tag=LATE_TAG) == self.count

    def _tell(self, tag: int, value: Any) -> None:
        self._sent += [self.comm.isend(value, dest=peer, tag=tag) for peer in range(self.size) if peer != self.rank]

    def _all_left(self) -> dict[int, int]:
        while self.comm.Iprobe(tag=LEFT_TAG):
            peer, count = self.comm.recv(tag=LEFT_TAG)
            self._left[peer] = count
        return self._left

    def leave(self) -> None:
        """Tell the peers how many meetings this rank came to."""
        if self.comm is not None and self.rank not in self._left:
            self._left[self.rank] = self.count
            self._tell(LEFT_TAG, (self.rank, self.count))

    def end(self) -> None:
        self.leave()

    def peers_left(self) -> bool | None:
        """None where one calls the roll: it waits for this rank."""
        if self.comm is None or len(self._all_left()) == self.size:
            return True
        return None if self.comm.Iprobe(tag=LATE_TAG) else False

    def abort(self, reason: str) -> None:
        self.whole = False
        leaving.stay()
        self._tell(ABORT_TAG, reason)

    def close(self) -> None:
        self.leave()
        free(self.comm)
        self.comm = None

    def split(self, comm, members: Sequence[int]) -> "MessageArrivals":
        return MessageArrivals(comm)
