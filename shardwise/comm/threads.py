"""Transport `threads`: all ranks of a job as threads of one process. Most tests run on it.

Ranks meet at a board: each posts a snapshot for its next sequence number and waits for all others' snapshots. As
snapshots are private, a rank may go on (and overwrite its tensors) while slower ranks still read.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.comm import compose, watch
from shardwise.comm.arguments import starts
from shardwise.comm.base import CollectiveTimeout, CommError
from shardwise.comm.collective import BaseCommunicator
from shardwise.comm.control import EXCHANGE


class Board:
    """Where the threads of one group meet; `children` holds the boards of its sub-groups."""

    def __init__(self, size: int):
        self.size = size
        self.changed = threading.Condition()
        self.posts: dict[int, dict[int, Any]] = {}
        self.readers: dict[int, int] = {}
        self.reason: str | None = None
        self.children: dict[Any, Board] = {}

    def meet(self, step: int, rank: int, value: Any, limit: float, describe: Callable[[list[int]], str]) -> list[Any]:
        """All ranks' values of `step`, in rank order; gives up after `limit` seconds."""
        with self.changed:
            posts = self.posts.setdefault(step, {})
            posts[rank] = value
            if len(posts) == self.size:
                self.changed.notify_all()
            end = time.monotonic() + limit
            while len(posts) < self.size:
                if self.reason is not None:
                    raise CommError(f"{describe([])}: {self.reason}")
                left = end - time.monotonic()
                if left <= 0 or not self.changed.wait(left):
                    missing = [i for i in range(self.size) if i not in posts]
                    if missing:
                        raise CollectiveTimeout(describe(missing), tuple(missing))
            self._forget(step)
        return [posts[i] for i in range(self.size)]

    def _forget(self, step: int) -> None:
        self.readers[step] = self.readers.get(step, 0) + 1
        if self.readers[step] == self.size:
            del self.posts[step], self.readers[step]

    def child(self, key: Any, size: int) -> "Board":
        with self.changed:
            if key not in self.children:
                self.children[key] = Board(size)
                self.children[key].reason = self.reason
            return self.children[key]

    def break_up(self, reason: str) -> None:
        with self.changed:
            self.reason = self.reason or reason
            children = list(self.children.values())
            self.changed.notify_all()
        for child in children:
            child.break_up(reason)


class ThreadsCommunicator(BaseCommunicator):
    """One thread's end of a group."""

    devices = ("cpu", "cuda")

    def __init__(
        self,
        board: Board,
        rank: int,
        ranks: Sequence[int],
        **options,
    ):
        super().__init__(rank=rank, ranks=ranks, transport="threads", **options)
        self._board = board
        self._step = 0

    def _meet(self, value: Any, call: int | None = None) -> list[Any]:
        """`call`: number that the ranks compare; None: of what this rank has begun."""
        self._step += 1
        limit = self.deadlines.in_phase(watch.current_phase())
        post = self._call_number() if call is None else call, self._fingerprint, value
        try:
            posts = self._board.meet(self._step, self.rank, post, limit, lambda missing: self._late(missing, limit))
        except CollectiveTimeout as error:
            error.missing = tuple(self.ranks[i] for i in error.missing)
            raise self._fail(error) from None
        except CommError as error:
            raise self._fail(error) from None
        numbers, calls, values = zip(*posts, strict=True)
        if len(set(numbers)) > 1:
            self._compare([call() for call in calls])
        return list(values)

    def _late(self, missing: list[int], limit: float) -> str:
        where = self._where(self._last_entry())
        if not missing:
            return where
        return f"{where}: rank(s) {', '.join(str(self.ranks[i]) for i in missing)} did not arrive within {limit:g} s"

    def _all_reduce(self, source: Tensor, target: Tensor) -> None:
        compose.ordered_sum(self._meet(_snapshot(source)), target)

    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        for part, value in zip(joined.split(list(counts)), self._meet(_snapshot(source)), strict=True):
            part.copy_(value)

    def _reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        start = starts(counts)[self.rank]
        parts = [value[start : start + counts[self.rank]] for value in self._meet(_snapshot(joined))]
        compose.ordered_sum(parts, target)

    def _all_to_all(
        self, source: Tensor, target: Tensor, sends: Sequence[int], receives: Sequence[int], longest: int | None
    ) -> None:
        everyone = self._meet((_snapshot(source), sends))
        for part, (value, theirs) in zip(target.split(list(receives)), everyone, strict=True):
            start = starts(theirs)[self.rank]
            part.copy_(value[start : start + theirs[self.rank]])

    def _broadcast(self, data: Tensor, root: int) -> None:
        values = self._meet(_snapshot(data) if self.rank == root else None)
        if self.rank != root:
            data.copy_(values[root])

    def _barrier(self) -> None:
        self._meet(None)

    def _empty_call(self) -> None:
        self._meet(None)

    def _exchange(self, blob: bytes) -> list[bytes]:
        return self._meet(blob, EXCHANGE)

    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> "ThreadsCommunicator":
        return ThreadsCommunicator(
            self._board.child(name, len(members)),
            members.index(self.rank),
            [self.ranks[i] for i in members],
            name=name,
            **self._settings,
        )

    def _abort(self, reason: str) -> None:
        self._board.break_up(reason)


def _snapshot(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    if copy.is_cuda:  # the other threads read it on their own streams
        torch.cuda.current_stream(copy.device).synchronize()
    return copy
