"""How a rank waits for torch.distributed, and what it says when a wait ends badly.

A wait on gloo is cut into slices; between them the rank looks for an abort and for the deadline. At the deadline
every waiting rank writes its name into the store, and who did not write is missing. NCCL runs on the GPU's stream,
where torch's watchdog holds the deadline.
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

    def _done(self, work: dist.Work | None) -> None:
        if work is None:
            return
        if self.transport == "nccl":
            work.wait()
            return
        limit = self.deadlines.in_phase(watch.current_phase())
        end = time.monotonic() + limit
        while True:
            ended = work.is_completed()  # asked before: work that ends right after a slice has not failed
            try:
                work.wait(SLICE)
                return
            except RuntimeError as error:
                if ended or not _timed_out(error):
                    raise self._library_failed(error) from error
            self._look_for_abort()
            if time.monotonic() > end:
                raise self._late(limit)

    def _look_for_abort(self) -> None:
        if self._aborts.check(["abort"]):
            reason = self._aborts.get("abort").decode(errors="replace")
            raise self._fail(CommError(f"{self._where(self._last_entry())}: {reason}"))

    @property
    def _aborts(self) -> dist.Store:
        return self.store.store

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
        place = f"late/{self.name}/{self.sequence}"
        missing = []
        end = time.monotonic() + watch.ROLL_CALL_SECONDS
        try:
            self.store.set(f"{place}/{self.rank}", b"here")
            for rank in range(self.size):
                try:
                    self.store.get(f"{place}/{rank}", max(0.01, end - time.monotonic()))
                except TimeoutError:
                    missing.append(self.ranks[rank])
        except RuntimeError as error:
            return self._fail(
                CollectiveTimeout(
                    f"{self._where(self._last_entry())}: not done within {limit:g} s, no roll call: {error}"
                )
            )
        names = ", ".join(map(str, missing)) or "none; a rank is slow or its call differs"
        text = f"{self._where(self._last_entry())}: rank(s) {names} did not arrive within {limit:g} s"
        return self._fail(CollectiveTimeout(text, tuple(missing)))

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
