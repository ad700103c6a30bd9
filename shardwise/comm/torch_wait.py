"""How a rank waits for torch.distributed, and what it says when a wait ends badly.

A wait on gloo is cut into slices; between them the rank looks for an abort, for a rank that calls the roll, and for
the deadline. The first rank at its deadline calls the roll through the store, every rank that waits for the same
collective writes its name there, and who did not write is missing. NCCL runs on the GPU's stream, where torch's
watchdog holds the deadline.
"""

import contextlib
import time
from datetime import timedelta

import torch.distributed as dist

from shardwise.comm import watch
from shardwise.comm.base import CollectiveTimeout, CommError, PeerLost
from shardwise.comm.bootstrap import TorchStore
from shardwise.comm.collective import BaseCommunicator

SLICE = timedelta(seconds=0.2)
GRACE_SECONDS = 1.0
"""What rank 0 has sent may come in for so long after it left, and the store with it."""
ROLL_LOOK_SECONDS = 0.02
LOST_SIGNS = (
    "Connection closed by peer",
    "Connection was likely closed",
    "Connection reset",
    "Broken pipe",
    "Socket closed",
)


class WaitingCommunicator(BaseCommunicator):
    """Of ranks that have a store in common."""

    store: TorchStore
    _answered = ""
    """The roll call that this rank has answered last."""

    def _done(self, work: dist.Work | None) -> None:
        if work is None:
            return
        if self.transport == "nccl":
            work.wait()
            return
        limit = self.deadlines.in_phase(watch.current_phase())
        end = time.monotonic() + limit
        alone: float | None = None
        while True:
            # Asked before the slice: work that ends right after it has not failed, and a rank that was stopped by the
            # system until after its deadline waits one slice more.
            ended, late = work.is_completed(), time.monotonic() > end
            try:
                work.wait(SLICE)
                return
            except RuntimeError as error:
                if ended or not _timed_out(error):
                    raise self._library_failed(error) from error
            try:
                self._look_around()
            except CommError:
                raise
            except RuntimeError as error:  # the store is gone, as rank 0 is
                alone = alone or time.monotonic()
                if time.monotonic() - alone > GRACE_SECONDS:
                    raise self._library_failed(error) from error
                continue
            if late:
                raise self._late(limit)

    def _look_around(self) -> None:
        """For an abort, and for a rank that calls the roll."""
        self._look_for_abort()
        place = self._roll
        if place != self._answered and self.store.has(f"{place}/called"):
            self._answer(place)

    @property
    def _roll(self) -> str:
        """Where those answer who wait for this collective."""
        return f"late/{self.name}/{self.sequence}"

    def _answer(self, place: str) -> None:
        self._answered = place
        self.store.set(f"{place}/{self.rank}", b"here")

    def _look_for_abort(self) -> None:
        if self.store.has("abort"):
            reason = self.store.store.get("abort").decode(errors="replace")
            raise self._fail(CommError(f"{self._where(self._last_entry())}: {reason}"))

    def _library_failed(self, error: Exception) -> CommError:
        where = self._where(self._last_entry())
        try:
            self._look_for_abort()
        except CommError as aborted:
            return aborted
        except RuntimeError:  # the store is gone when rank 0 is
            pass
        if any(sign in str(error) for sign in LOST_SIGNS):
            return self._fail(PeerLost(f"{where}: a peer's connection broke, its process is gone: {error}"))
        return self._fail(CommError(f"{where}: {self.transport} failed: {error}"))

    def _late(self, limit: float) -> CommError:
        """Roll call through the store: whoever waits for the same collective answers."""
        place = self._roll
        absent = list(range(self.size))
        end = time.monotonic() + watch.ROLL_CALL_SECONDS
        try:
            self.store.set(f"{place}/called", b"")
            self._answer(place)
            while absent and time.monotonic() < end:
                time.sleep(ROLL_LOOK_SECONDS)
                absent = [rank for rank in absent if not self.store.has(f"{place}/{rank}")]
        except RuntimeError as error:  # the store is gone, and whoever answers now is not heard
            return self._fail(
                CollectiveTimeout(
                    f"{self._where(self._last_entry())}: not done within {limit:g} s, no roll call: {error}"
                )
            )
        missing = tuple(self.ranks[rank] for rank in absent)
        names = ", ".join(map(str, missing)) or "none; a rank is slow or its call differs"
        text = f"{self._where(self._last_entry())}: rank(s) {names} did not arrive within {limit:g} s"
        return self._fail(CollectiveTimeout(text, missing))

    @contextlib.contextmanager
    def _calls(self):
        try:
            yield
        except CommError:
            raise
        except RuntimeError as error:
            raise self._library_failed(error) from error


def _timed_out(error: Exception) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text
