"""Ranks, their memory and the stores under way, moved one operation at a time: what `model.py` runs.

A block of a call is a list of memory operations on words at the kernels' addresses; a rank runs the blocks of one call
together, and its next call when all have ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardwise.comm.p2p.protocol import KINDS, Address, Block, Call, Operation, Value


@dataclass(frozen=True)
class Rules:
    """How slots are used. The kernels follow the defaults; the others show what the rules are for."""

    slots: int = 2
    rearm: str = "at once"
    """When a word that was taken is marked as not arrived: "at once", during the "next call", or "never"."""


@dataclass(frozen=True)
class Faults:
    slow: frozenset[int] = frozenset()
    """Ranks that rarely get a turn."""
    dead: Mapping[int, int] = field(default_factory=dict)
    """Rank: the call that it never makes."""
    drop: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(source, owner): the call in which the link loses a store."""
    rows: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(rank, call): the number of rows that this rank believes in."""


@dataclass
class Outcome:
    """Of one run. `stale`: every word that was not this call's, or was written over another; `missing`: by waiting
    rank, who never came."""

    finished: list[int]
    stale: list[str] = field(default_factory=list)
    missing: dict[int, set[int]] = field(default_factory=dict)


class Rank:
    """Memory, and how far the blocks of the running call are."""

    def __init__(self, rank: int):
        self.rank = rank
        self.memory: dict[Address, Value] = {}
        """What is not there is ARMED."""
        self.call = 0
        self.at: list[int] = []
        """By block, how many of its operations are done; empty between calls."""
        self.gave_up = False


class Machine:
    """All ranks and the stores under way."""

    def __init__(
        self,
        world: int,
        calls: Sequence[tuple],
        *,
        blocks: int | Sequence[int] = 2,
        ahead: int = 0,
        pushers: int = 1,
        share: int = 1,
        rules: Rules | None = None,
        faults: Faults | None = None,
    ):
        """calls: (strategy, rows) or (strategy, rows, words of a row); blocks: of every rank, or one number for all."""
        self.world, self.calls = world, [Call(*call) for call in calls]
        self.ahead, self.pushers, self.share = ahead, pushers, share
        self.blocks = [blocks] * world if isinstance(blocks, int) else list(blocks)
        self.rules, self.faults = rules or Rules(), faults or Faults()
        self.programs: list[list[list[list[Operation]]]] = [[] for _ in range(world)]
        """By rank, call and block."""
        for rank in range(world):
            for number in range(len(calls)):
                self.programs[rank].append(self._program(rank, number))
        self.ranks = [Rank(rank) for rank in range(world)]
        self.under_way: list[tuple[int, Address, Value]] = []
        self.outcome = Outcome([0] * world)

    def _program(self, rank: int, number: int) -> list[list[Operation]]:
        """The blocks of a call; where words are armed one call later, another block that does it."""
        call = self.calls[number]
        call = call._replace(rows=self.faults.rows.get((rank, number), call.rows))
        count = self.blocks[rank]
        how = self.ahead, min(self.pushers, count), self.share, self.rules.slots
        parts = [Block(rank, self.world, number, call, block, count, *how) for block in range(count)]
        blocks = [list(KINDS[call.strategy](part)) for part in parts]
        if self.rules.rearm == "next call" and number:
            before = self.programs[rank][number - 1]
            blocks.append([Operation("arm", op.address) for block in before for op in block if op.kind == "take"])
        return blocks

    def runnable(self, rank: Rank) -> bool:
        alive = self.faults.dead.get(rank.rank, len(self.calls)) > rank.call
        return alive and not rank.gave_up and rank.call < len(self.calls)

    def begin(self, rank: Rank) -> None:
        rank.at = [0] * len(self.programs[rank.rank][rank.call])
        self._end(rank)

    def _end(self, rank: Rank) -> None:
        """The call is over when all its blocks are."""
        if all(at == len(block) for at, block in zip(rank.at, self.programs[rank.rank][rank.call], strict=True)):
            rank.call += 1
            rank.at = []
            self.outcome.finished[rank.rank] = rank.call

    def waiting(self, rank: Rank) -> list[tuple[int, Operation]]:
        """(block, its next operation) of the blocks that have not ended."""
        if not rank.at:
            return []
        blocks = self.programs[rank.rank][rank.call]
        return [(i, blocks[i][at]) for i, at in enumerate(rank.at) if at < len(blocks[i])]

    def ready(self, rank: Rank) -> list[tuple[int, Operation]]:
        """Those whose next operation can be done now."""
        return [(block, op) for block, op in self.waiting(rank) if op.kind != "take" or op.address in rank.memory]

    def step(self, rank: Rank, block: int, operation: Operation) -> None:
        if operation.kind == "push":
            self._push(rank, operation)
        elif operation.kind == "take":
            self._take(rank, operation)
        else:
            rank.memory.pop(operation.address, None)
        rank.at[block] += 1
        self._end(rank)

    def _push(self, rank: Rank, operation: Operation) -> None:
        if self.faults.drop.get((rank.rank, operation.owner)) != rank.call or operation.address[2] != 0:
            assert operation.value is not None
            self.under_way.append((operation.owner, operation.address, operation.value))

    def arrive(self, index: int) -> None:
        owner, address, value = self.under_way.pop(index)
        memory = self.ranks[owner].memory
        if address in memory and self.rules.rearm != "never":
            self.outcome.stale.append(f"call {value[0]}: {value} is written over {memory[address]} of rank {owner}")
        memory[address] = value

    def _take(self, rank: Rank, operation: Operation) -> None:
        found = rank.memory[operation.address]
        if found != operation.value:
            self.outcome.stale.append(f"rank {rank.rank} call {rank.call} expected {operation.value}, found {found}")
        if self.rules.rearm == "at once":
            del rank.memory[operation.address]

    def expire(self, rank: Rank) -> None:
        """The deadline passes: every wait of the rank names whom it waits for, and the rank gives up."""
        waits = {op.address[1] for _, op in self.waiting(rank) if op.kind == "take" and op.address not in rank.memory}
        self.outcome.missing.setdefault(rank.rank, set()).update(waits)
        rank.gave_up = True

    # For `explore`: a state as a value

    def push_all(self) -> None:
        """Begin calls and push until every block waits: nobody sees a store before it arrives."""
        for rank in self.ranks:
            while True:
                if not rank.at and self.runnable(rank):
                    self.begin(rank)
                pushes = [(block, op) for block, op in self.waiting(rank) if op.kind == "push"]
                if not pushes:
                    break
                self.step(rank, *pushes[0])

    def state(self) -> tuple:
        return (
            tuple((rank.call, tuple(rank.at), frozenset(rank.memory.items())) for rank in self.ranks),
            frozenset(self.under_way),
        )

    def restore(self, state: tuple) -> None:
        for rank, (call, at, memory) in zip(self.ranks, state[0], strict=True):
            rank.call, rank.at, rank.memory = call, list(at), dict(memory)
        self.under_way = list(state[1])
