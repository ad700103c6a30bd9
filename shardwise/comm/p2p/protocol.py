"""What the kernels do to memory in a call, block by block, as operations that `model.py` runs without a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from shardwise.partition import extent

Address = tuple[int, int, int]
"""(slot, source, place): a word in its owner's workspace."""
Value = tuple[int, str | int, int]
"""(call, source or "sum", row): whose word it is."""


class Call(NamedTuple):
    strategy: str
    rows: int
    words: int = 1
    """Of a row."""


class Operation(NamedTuple):
    kind: str
    """push: to `owner`; take: wait, read and arm again; arm."""
    address: Address
    value: Value | None = None
    owner: int = 0


@dataclass(frozen=True)
class Block:
    """Which part of which call: `number` counts the calls, `blocks` those of this rank's launch."""

    rank: int
    world: int
    number: int
    call: Call
    block: int
    blocks: int
    ahead: int
    """Of one-shot: rows pushed before the first is taken."""
    pushers: int
    """Of two-shot: blocks that push contributions."""
    share: int
    """Of two-shot: rows that each of them takes at the end."""
    slots: int

    def peers(self) -> Iterator[int]:
        return ((self.rank + hop) % self.world for hop in range(1, self.world))

    def pushes(self, owner: int, place: int, source: str | int, row: int) -> Iterator[Operation]:
        """One row into this rank's region of `owner`."""
        for word in range(self.call.words):
            address = self.number % self.slots, self.rank, place * self.call.words + word
            yield Operation("push", address, (self.number, source, row), owner)

    def takes(self, place: int, source: int, whose: str | int, row: int) -> Iterator[Operation]:
        """One row out of the region of `source` in this rank's workspace."""
        for word in range(self.call.words):
            address = self.number % self.slots, source, place * self.call.words + word
            yield Operation("take", address, (self.number, whose, row))


def one_shot(at: Block) -> Iterator[Operation]:
    """Push every row to every peer, `ahead` rows before it is taken from every peer."""
    mine = range(at.block, at.call.rows, at.blocks)
    for turn in range(-at.ahead, len(mine)):
        if turn + at.ahead < len(mine):
            row = mine[turn + at.ahead]
            for peer in at.peers():
                yield from at.pushes(peer, row, at.rank, row)
        if turn >= 0:
            for source in range(at.world):
                if source != at.rank:
                    yield from at.takes(mine[turn], source, source, mine[turn])


def two_shot(at: Block) -> Iterator[Operation]:
    """The first blocks push contributions and take the sums of the last turns; the others sum and take the rest."""
    turns, others = -(-at.call.rows // at.world), at.world - 1
    adders = max(at.blocks - at.pushers, 1)
    together = at.pushers // others
    late = max(turns - together * at.share, 0) if at.blocks > at.pushers else turns

    def row(owner: int, turn: int) -> int | None:
        start, stop = extent(at.call.rows, at.world, owner)
        return start + turn if start + turn < stop else None

    def gather(turn: int, hop: int) -> Iterator[Operation]:
        owner = (at.rank - hop) % at.world
        theirs = row(owner, turn)
        if theirs is not None:
            yield from at.takes(turns + turn, owner, "sum", theirs)

    if at.block < at.pushers:
        for item in range(at.block, turns * others, at.pushers):
            peer = (at.rank + 1 + item % others) % at.world
            theirs = row(peer, item // others)
            if theirs is not None:
                yield from at.pushes(peer, item // others, at.rank, theirs)
    if at.block < at.blocks - adders:
        for turn in range(late + at.block // others, turns, together) if at.block < together * others else ():
            yield from gather(turn, at.block % others + 1)
        return
    for turn in range(at.block + adders - at.blocks, turns, adders):
        mine = row(at.rank, turn)
        if mine is not None:
            for source in range(at.world):
                if source != at.rank:
                    yield from at.takes(turn, source, source, mine)
            for peer in at.peers():
                yield from at.pushes(peer, turns + turn, "sum", mine)
        for hop in range(1, at.world) if turn < late else ():
            yield from gather(turn, hop)


KINDS = {"ONESHOT": one_shot, "TWOSHOT": two_shot}
