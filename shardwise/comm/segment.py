"""Memory that the ranks of one host share (`sharing.py` makes it), and how they wait for each other in it.

A *round* is the only pattern of communication. In round e every rank writes into its half `e & 1`, publishes e in
its flag word `e & 1`, waits until all such flags show e, and reads the others' halves. Both may be overwritten in
round e + 2: by then all ranks have published e + 1, and they did that after their reads of round e. So a round costs
one synchronisation and nothing is ever cleared. A flag's low bits hold a number of what its rank calls: ranks that
came for different calls see it before they read, at no cost.

Memory order: the protocol needs stores to become visible in program order, and loads not to pass later stores. x86-64
gives both to plain accesses (an aligned 8-byte flag is written by one move; glibc's non-temporal copies end with a
fence). Other machines do not, and Python has no fence: there `sharing.usable` refuses.
"""

import mmap
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardwise.comm import leaving, watch
from shardwise.comm.base import CollectiveTimeout, CommError, PeerLost
from shardwise.comm.control import CALL_BITS, DIFFERENCE, EXCHANGE, LEFT

if TYPE_CHECKING:
    from shardwise.comm.sharing import Identity

LINE = 64
ENDED = 2
"""Beside a rank's two flags, the word that is 1 when its program has ended."""
PAGE = 4096
FRAME = 512
"""Bytes of a control frame: its length in 8 bytes, then the message."""
REASON = 1024
SPINS, FEW_SPINS = 4000, 64
"""Reads of a flag (about 50 ns each) before the first yield: more than a rank lags behind in a decode step. Few when
the peer turns out to need this rank's core: on a busy host a call takes 265 µs with many, 43 with few."""
HANDED_OVER_SECONDS = 600e-6
"""A peer that arrives so soon after a first yield was waiting for the core; a stranger on it stays for milliseconds."""
YIELD_SECONDS = 0.02
SHORT_SLEEP, LONG_SLEEP = 50e-6, 1e-3
THREADS = "two threads of a rank were in calls on this group at once; split one off for each thread"
LOOK_SECONDS = 0.05
"""How often a waiting rank looks whether its peers still live."""
END_SECONDS = 2.0
"""What a peer that has left gets to end, with an exit code of its own, before this rank says that it is missing."""


class WaitFailed(Exception):
    """A round that was not completed; `missing` holds the ranks of the group to blame.

    kind  "late", "lost" (the process is gone), "differs" (came for another call), "aborted", or "confused" (two threads
          of one rank)
    """

    def __init__(self, kind: str, missing: tuple[int, ...], reason: str):
        super().__init__(reason)
        self.kind = kind
        self.missing = missing
        self.reason = reason

    def explained(self, where: str, ranks: Sequence[int]) -> CommError:
        """What the collective `where` raises for it, in a group of these ranks of the world."""
        missing = tuple(ranks[peer] for peer in self.missing)
        names = ", ".join(map(str, missing)) or "?"
        if self.kind == "late":
            return CollectiveTimeout(f"{where}: rank(s) {names} {self.reason}", missing)
        if self.kind == "lost":
            return PeerLost(f"{where}: rank(s) {names} will not arrive: {self.reason}", missing)
        return CommError(f"{where}: {self.reason}")


class Segment:
    """One group's memory: page 0 is common, then a control page for each rank, then two halves for each rank.

    The first word of page 0 is 0, or after an abort 1 + the rank that gave the reason. A control page has the rank's
    flags of even and odd rounds, whether it has ended, its frames of rounds, and its reason of an abort.
    """

    def __init__(
        self,
        fd: int,
        size: int,
        rank: int,
        half: int,
        members: "list[Identity]",
        crowded: bool,
        root: "Segment | None" = None,
    ):
        self.size = size
        self.rank = rank
        self.half = half
        self.members = members
        self.map = mmap.mmap(fd, self.length(size, half), mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.view = memoryview(self.map)
        self.words = self.view[: PAGE * (1 + size)].cast("q")
        self.root = root or self
        """The world's segment: an abort there ends the rounds of its sub-groups."""
        self.epoch = 0
        self.flag = self._word(rank)
        self.others = tuple((peer, self._word(peer)) for peer in range(size) if peer != rank)
        self.peer_words = tuple(tuple(word + parity for _, word in self.others) for parity in (0, 1))
        """The peers' flags in even and in odd rounds."""
        self.spins = 0 if crowded else SPINS
        self.failed = False
        """A wait of this rank ended in WaitFailed."""
        self.left = False
        self._process = os.getpid()  # a fork of it leaves nothing
        leaving.register(self)

    def __del__(self):
        if hasattr(self, "_process"):
            self.leave()

    @staticmethod
    def length(size: int, half: int) -> int:
        return PAGE * (1 + size) + 2 * size * half

    @staticmethod
    def _word(rank: int) -> int:
        return PAGE * (1 + rank) // 8

    def half_offset(self, rank: int, parity: int) -> int:
        """Where rank's half begins in the map."""
        return PAGE * (1 + self.size) + (2 * rank + parity) * self.half

    @property
    def aborted(self) -> str | None:
        """Reason of the abort of this group or of the world, if there was one."""
        for segment in (self, self.root):
            if segment.words[0]:
                return segment._text(segment._reason(segment.words[0] - 1)).decode(errors="replace")
        return None

    def abort(self, reason: str) -> None:
        """End all present and later rounds of all ranks, of the world too. The first reason stays.

        Each rank has a place for its own: of ranks that abort at the same moment one is named, with its whole reason.
        """
        blob = reason.encode()[:REASON]
        for segment in (self, self.root):
            if not segment.words[0]:
                segment._write(segment._reason(segment.rank), blob)
                segment.words[0] = 1 + segment.rank

    def round(self, limit: float, call: int) -> None:
        """Publish the half that was written for round `epoch + 1`, and wait for all ranks' halves of it.

        call  number of what this rank calls (control.call_number); raises WaitFailed where a peer has another
        """
        self.epoch = epoch = self.epoch + 1
        shown = epoch << CALL_BITS | call
        self.words[self.flag + (epoch & 1)] = shown
        self.wait(shown, limit)

    def wait(self, shown: int, limit: float) -> None:
        """The second half of a `round`, whose first half the caller may do itself: this rank's flag is `shown`."""
        words = self.words
        for word in self.peer_words[self.epoch & 1]:
            spins = self.spins
            while words[word] != shown:
                spins -= 1
                if spins < 0:
                    try:
                        self._wait(shown, limit)
                    except WaitFailed:
                        self.failed = True
                        raise
                    return

    @property
    def whole(self) -> bool:
        """Neither aborted nor did a wait of this rank fail."""
        return not (self.failed or self.words[0] or self.root.words[0])

    def leave(self) -> None:
        """Show the peers that this rank comes to no more rounds; who waits for it is told so."""
        if self.whole and not self.left and self._process == os.getpid():
            self.left = True
            self.epoch += 1
            self.words[self.flag + (self.epoch & 1)] = self.epoch << CALL_BITS | LEFT

    def end(self) -> None:
        """`leave`, also a group that is broken: this rank's program has ended."""
        self.leave()
        self.words[self.flag + ENDED] = 1

    def peers_left(self) -> bool | None:
        """After `end`: whether all peers have left too, or have ended where the group is broken. None: one never will,
        it waits for this rank or is gone."""
        leavers = self._leavers()
        if not self.whole:
            here = [peer for peer, word in self.others if not self.words[word + ENDED]]
        elif any(self._here(flag) for peer, flag in self._shown().items() if peer not in leavers):
            return None
        else:
            here = [peer for peer, _ in self.others if peer not in leavers]
        if not all(watch.process_alive(self.members[peer].pid, self.members[peer].started) for peer in here):
            return None
        return not here

    def frame_round(self, blob: bytes, limit: float, call: int = EXCHANGE) -> list[bytes]:
        """A round that carries one small message from each rank, in the control pages."""
        parity = (self.epoch + 1) & 1
        self._write(self._frame(self.rank, parity), blob)
        self.round(limit, call)
        return [self._text(self._frame(rank, parity)) for rank in range(self.size)]

    def _write(self, start: int, blob: bytes) -> None:
        self.view[start + 8 : start + 8 + len(blob)] = blob
        self.words[start // 8] = len(blob)

    def _text(self, start: int) -> bytes:
        return bytes(self.view[start + 8 : start + 8 + self.words[start // 8]])

    def calls(self, mine: bytes, limit: float) -> list[bytes]:
        """What all ranks called, in words, after a round that failed for the difference: all of them have seen it."""
        return self.frame_round(mine, limit, DIFFERENCE)

    @staticmethod
    def _frame(rank: int, parity: int) -> int:
        return PAGE * (1 + rank) + LINE + parity * FRAME

    @classmethod
    def _reason(cls, rank: int) -> int:
        return cls._frame(rank, 2)

    def _wait(self, shown: int, limit: float) -> None:
        """The slow side of a round: yield, then sleep, and look for aborts, deaths and the deadline."""
        begin = time.monotonic()
        look = begin + LOOK_SECONDS
        turns = 0
        while any(self.words[word] != shown for word in self.peer_words[self.epoch & 1]):
            turns += 1
            if turns & 15:
                os.sched_yield()
                continue
            now = time.monotonic()
            if self.words[0] or self.root.words[0]:
                raise WaitFailed("aborted", (), self.aborted or "")
            if shown >> CALL_BITS != self.epoch:
                raise WaitFailed("confused", (), THREADS)
            self._compare(shown)
            if now > look:
                self._look(now - begin, limit)
                look = now + LOOK_SECONDS
            if now - begin > YIELD_SECONDS:
                time.sleep(SHORT_SLEEP if now - begin < 1 else LONG_SLEEP)
        if self.spins:
            handed_over = turns <= 2 and time.monotonic() - begin < HANDED_OVER_SECONDS
            self.spins = max(FEW_SPINS, self.spins // 2) if handed_over else min(SPINS, self.spins * 2)

    def _shown(self) -> dict[int, int]:
        """By peer: its flag of this round."""
        return {peer: self.words[word + (self.epoch & 1)] for peer, word in self.others}

    def _here(self, flag: int) -> bool:
        return flag >> CALL_BITS >= self.epoch

    def _absent(self) -> list[int]:
        return [peer for peer, flag in self._shown().items() if not self._here(flag)]

    def _leavers(self) -> tuple[int, ...]:
        """Peers that left instead of coming to this round."""
        return tuple(peer for peer, flag in self._shown().items() if flag == self.epoch << CALL_BITS | LEFT)

    def _compare(self, shown: int) -> None:
        """Once all are here: a rank that left for the next round earlier could overwrite a flag before all saw it."""
        flags = self._shown()
        other = tuple(peer for peer, flag in flags.items() if flag != shown)
        if other and not self._leavers() and all(flag >> CALL_BITS == self.epoch for flag in flags.values()):
            raise WaitFailed("differs", other, "called something else")

    def _look(self, waited: float, limit: float) -> None:
        absent = self._absent()
        gone = [p for p in absent if not watch.process_alive(self.members[p].pid, self.members[p].started)]
        gone = [peer for peer in gone if peer in self._absent()]  # it may have arrived, then ended
        if gone:
            pids = ", ".join(str(self.members[peer].pid) for peer in gone)
            raise WaitFailed("lost", tuple(gone), f"process {pids} is gone")
        if leavers := self._leavers():
            raise WaitFailed("lost", leavers, self._end_of(leavers))
        if waited > limit and absent:
            raise WaitFailed("late", tuple(absent), f"did not arrive within {limit:g} s")
        if waited > limit and max(self._shown().values()) >> CALL_BITS > self.epoch:  # ahead of a rank that waits
            raise WaitFailed("confused", (), THREADS)

    def _end_of(self, peers: Sequence[int]) -> str:
        """What became of peers that have left: one at the end of its program is gone soon."""
        end = time.monotonic() + END_SECONDS
        alive = [self.members[peer] for peer in peers]
        while alive and time.monotonic() < end:
            time.sleep(LONG_SLEEP)
            alive = [member for member in alive if watch.process_alive(member.pid, member.started)]
        if alive:
            return "has closed the group or ended its program"
        return f"process {', '.join(str(self.members[peer].pid) for peer in peers)} has ended"
