"""A rank's membership in a group: its place, sub-groups, the record of its calls, check mode, and how a group breaks.

`collective.py` adds the collectives.
"""

import os
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shardwise.comm import control, names, watch
from shardwise.comm.base import CollectiveMismatch, CommError, Communicator, Unavailable
from shardwise.comm.watch import FLIGHT, Deadlines

if TYPE_CHECKING:
    from shardwise.comm.collective import BaseCommunicator

ALONE = "one rank has no peers to talk to"


class Member(Communicator):
    """One rank's place in a group. `name` tells groups apart in messages: world, world/0, ..."""

    strategies: tuple[str, ...] = ("AUTO", "NCCL", "MIN_LATENCY", "ONESHOT", "TWOSHOT")
    """What `all_reduce` takes by name; on CPU groups NCCL means the transport's own default algorithm."""
    devices: tuple[str, ...] = ("cpu",)
    """Types of the devices whose tensors it moves."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: Sequence[int],
        transport: str,
        name: str = "world",
        deadlines: Deadlines | None = None,
        check: bool | None = None,
        deterministic: bool | None = None,
    ):
        self.rank = rank
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.transport = transport
        self.name = name
        self.deadlines = deadlines or Deadlines.from_environment()
        self.check = watch.environment_flag("SHARDWISE_CHECK") if check is None else check
        self.deterministic = (
            watch.environment_flag("SHARDWISE_DETERMINISTIC") if deterministic is None else deterministic
        )
        self.sequence = 0
        self.broken: str | None = None
        self.reason = "asked for by name"
        self._world_rank = self.ranks[rank]
        self._splits = 0
        self._parts: list[BaseCommunicator] = []  # groups split off this one
        self._call: tuple[list, tuple] | None = None
        """What was announced last: an entry, and what else ranks must agree on."""
        _members.add(self)

    def __repr__(self) -> str:
        return f"<{self.transport} group {self.name}: rank {self.rank} of {self.size}>"

    @property
    def _settings(self) -> dict[str, Any]:
        """What a group hands on to those made of it."""
        return {"deadlines": self.deadlines, "check": self.check, "deterministic": self.deterministic}

    def why(self) -> str:
        """One line: what moves this group's bytes, and for what reason. The same on all ranks."""
        return f"group {self.name} of {self.size}: {self.transport} ({self.reason})"

    def split(self, color: int, key: int | None = None) -> Communicator:
        wanted = self.all_gather_object((color, self.rank if key is None else key))
        return self.split_known([c for c, _ in wanted], [k for _, k in wanted])

    def split_known(self, colors: Sequence[int], keys: Sequence[int] | None = None) -> "BaseCommunicator":
        keys = range(self.size) if keys is None else keys
        if len(colors) != self.size or len(keys) != self.size:
            raise ValueError(
                f"split of group {self.name}: {len(colors)} colors and {len(keys)} keys for {self.size} ranks"
            )
        self._require_whole("split")
        self._announce([self.sequence, "split", (), "", "", self.name], tuple(colors), tuple(keys))
        self._empty_call()
        color = colors[self.rank]
        members = sorted((keys[rank], rank) for rank in range(self.size) if colors[rank] == color)
        self._splits += 1
        name = f"{self.name}/{self._splits}.{color}"
        if len(set(colors)) == self.size:
            return self._alone(name)
        part = self._split(name, [rank for _, rank in members], list(colors), list(keys))
        self._parts.append(part)
        return part

    def _alone(self, name: str) -> "BaseCommunicator":
        from shardwise.comm.fake import FakeCommunicator  # which derives from this class

        group = FakeCommunicator(0, (self._world_rank,), name=name, **self._settings)
        group.reason = ALONE
        return group

    def abort(self, reason: str) -> None:
        self.broken = self.broken or reason
        self._abort(reason)

    def close(self) -> None:
        for part in self._parts:
            part.broken = part.broken or self.broken  # a broken one does not wait for its members
            part.close()
        self._parts.clear()
        self.broken = self.broken or "the group is closed"

    def _forked(self) -> None:
        """This process is a child of the one that is the member: it would speak in that one's name."""
        self.broken = self.broken or "this process was forked from the rank's: make groups after forking"

    def _require(self, strategy: str) -> None:
        names.require_strategy(strategy)
        if strategy not in self.strategies:
            raise Unavailable(
                f"strategy {strategy} cannot run on transport {self.transport} (group {self.name}); "
                f"legal here: {', '.join(self.strategies)}"
            )

    def _require_device(self, tensor: Tensor, op: str) -> None:
        if tensor.device.type not in self.devices:
            kind = tensor.device.type
            cure = f"make the group with create(..., device={kind!r})" if kind in ("cpu", "cuda") else "move it there"
            raise TypeError(
                f"{op} on group {self.name}: the tensor is on {tensor.device}, transport {self.transport} moves "
                f"{' and '.join(self.devices)} tensors; {cure}"
            )

    def _begin(self, op: str, shape, dtype, strategy: str, *details) -> list:
        self._require_whole(op)
        self.sequence = sequence = self.sequence + 1
        entry = [sequence, op, shape, dtype, strategy, self.name, self._world_rank, watch.now(), 0]
        FLIGHT.ring.append(entry)
        self._announce(entry, *details)
        return entry

    def _require_whole(self, op: str) -> None:
        if self.broken is not None:
            raise CommError(f"{op} on group {self.name}, rank {self._world_rank}: {self.broken}")

    def _announce(self, entry: list, *details) -> None:
        """What this rank has come for; check mode compares it before any byte of the payload moves."""
        self._call = entry, details
        if self.check:
            self._compare(self._exchange(self._fingerprint()))

    def _call_number(self) -> int:
        """`control.call_number` of what this rank has announced, for transports whose rounds show it at no cost."""
        entry, details = self._call or ([0, "", (), "", ""], ())
        return control.call_number(*entry[watch.OP : watch.STRATEGY + 1], details)

    def _fingerprint(self) -> bytes:
        """What this rank has come for, in words. A transport's short cut for small sums announces nothing."""
        entry, details = self._last_entry() or [0, "nothing", (), "", "", self.name], ()
        if self._call is not None and self._call[0][watch.SEQUENCE] == self.sequence:
            entry, details = self._call
        return control.fingerprint(control.call_text(entry, details))

    def _compare(self, calls: Sequence[bytes]) -> None:
        """CollectiveMismatch unless all ranks began the same; no byte of the payload has moved then."""
        for rank, other in enumerate(calls):
            if other != calls[0]:
                raise self._fail(
                    CollectiveMismatch(
                        f"ranks disagree in group {self.name}: rank {self.ranks[0]} called {calls[0].decode()}; "
                        f"rank {self.ranks[rank]} called {other.decode()}"
                    )
                )

    def _fail(self, error: CommError) -> CommError:
        """Mark the group broken, dump the flight record, and hand `error` back to raise."""
        self.broken = self.broken or str(error)
        path = FLIGHT.dump(self._world_rank)
        if path:
            error.add_note(f"flight record: {path}")
        return error

    def _where(self, entry: list | None = None) -> str:
        entry = entry or [self.sequence, "collective"]
        return f"{entry[watch.OP]} #{entry[watch.SEQUENCE]} on group {self.name}, rank {self._world_rank}"

    def _last_entry(self) -> list | None:
        for entry in reversed(list(FLIGHT.ring)):  # a copy: ranks that are threads append to it meanwhile
            if entry[watch.RANK] == self._world_rank and entry[watch.GROUP] == self.name:
                return entry
        return None

    def _empty_call(self) -> None:
        """A collective of empty tensors. A transport that compares the ranks' calls at no cost does so here too."""

    @abstractmethod
    def _exchange(self, blob: bytes) -> list[bytes]:
        """Everyone's control message of at most MESSAGE_BYTES, in group order; lengths may differ."""

    @abstractmethod
    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> "BaseCommunicator":
        """Group of `members` (ranks of this group, in the new order); `colors` and `keys`: of all ranks of this one."""

    @abstractmethod
    def _abort(self, reason: str) -> None: ...


_members: weakref.WeakSet[Member] = weakref.WeakSet()


def _after_fork() -> None:
    for member in list(_members):
        member._forked()


os.register_at_fork(after_in_child=_after_fork)
