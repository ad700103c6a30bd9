"""The kernels' protocol without a GPU: the same pushes, waits and re-arms, under every order that memory allows.

A block is a generator of memory operations; a rank runs the blocks of one call together, and its next call when
all have ended. `simulate` lets a seeded adversary pick each next step: a block's next operation, or the arrival of
one of the stores under way, in any order. Faults slow a rank, drop stores, kill a rank, or let it call with another
number of rows. Time passes only when nothing else can happen: a wait expires exactly when it would be for ever.

`run_threads` drives the same generators by one real thread a rank, with a deadline on the clock.
"""

import random
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

from shardwise.partition import extent

ARMED = None
Place = tuple[str, int, int, int]
"""(kind, slot, source, row): a word's address in its owner's workspace."""
Block = Generator[tuple, object, None]


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
    """Of one run. `stale`: every word that was not this call's; `missing`: by waiting rank, who never came."""

    finished: list[int]
    stale: list[str] = field(default_factory=list)
    missing: dict[int, set[int]] = field(default_factory=dict)


def one_shot(rank: int, world: int, call: int, rows: int, block: int, blocks: int, slots: int) -> Block:
    """Push every row to every peer, then take every peer's."""
    slot = call % slots
    mine = range(block, rows, blocks)
    for row in mine:
        for hop in range(1, world):
            yield "push", (rank + hop) % world, ("data", slot, rank, row), (call, rank, row)
    for row in mine:
        for source in range(world):
            if source != rank:
                yield "take", ("data", slot, source, row), (call, source, row)


def two_shot(rank: int, world: int, call: int, rows: int, block: int, blocks: int, slots: int) -> Block:
    """Push contributions to the owner of each row, sum the own part, push the sums, take the others' sums."""
    slot = call % slots
    turns = -(-rows // world)
    for turn in range(block, turns + blocks, blocks):
        for hop in range(1, world):
            peer = (rank + hop) % world
            start, stop = extent(rows, world, peer)
            if start + turn < stop:
                yield "push", peer, ("data", slot, rank, turn), (call, rank, start + turn)
        start, stop = extent(rows, world, rank)
        row = start + turn
        if row < stop:
            for source in range(world):
                if source != rank:
                    yield "take", ("data", slot, source, turn), (call, source, row)
            for hop in range(1, world):
                yield "push", (rank + hop) % world, ("sum", slot, rank, turn), (call, "sum", row)
        for hop in range(1, world):
            owner = (rank - hop) % world
            start, stop = extent(rows, world, owner)
            before = turn - blocks
            if before >= 0 and start + before < stop:
                yield "take", ("sum", slot, owner, before), (call, "sum", start + before)


def _arm(places: list[Place]) -> Block:
    for place in places:
        yield "arm", place


KINDS = {"ONESHOT": one_shot, "TWOSHOT": two_shot}


class _Rank:
    """Memory, running blocks and what each block waits for."""

    def __init__(self, rank: int):
        self.rank = rank
        self.memory: dict[Place, object] = {}
        self.call = 0
        self.blocks: list[Block] = []
        self.pending: dict[Block, tuple] = {}
        self.taken: list[Place] = []
        self.gave_up = False


class Machine:
    """All ranks and the stores under way."""

    def __init__(
        self,
        world: int,
        calls: list[tuple[str, int]],
        *,
        blocks: int = 2,
        rules: Rules | None = None,
        faults: Faults | None = None,
    ):
        self.world, self.calls, self.block_count = world, calls, blocks
        self.rules, self.faults = rules or Rules(), faults or Faults()
        self.ranks = [_Rank(rank) for rank in range(world)]
        self.under_way: list[tuple[int, Place, object]] = []
        self.outcome = Outcome([0] * world)

    def runnable(self, rank: _Rank) -> bool:
        alive = self.faults.dead.get(rank.rank, len(self.calls)) > rank.call
        return alive and not rank.gave_up and rank.call < len(self.calls)

    def begin(self, rank: _Rank) -> None:
        kind, rows = self.calls[rank.call]
        rows = self.faults.rows.get((rank.rank, rank.call), rows)
        rank.blocks = [
            KINDS[kind](rank.rank, self.world, rank.call, rows, block, self.block_count, self.rules.slots)
            for block in range(self.block_count)
        ]
        if self.rules.rearm == "next call":
            rank.blocks.append(_arm(rank.taken))
            rank.taken = []
        rank.pending = {}
        for block in list(rank.blocks):
            self._next(rank, block)

    def ready(self, rank: _Rank) -> list[Block]:
        """Blocks whose next operation can be done now."""
        return [b for b in rank.blocks if not self._waits(rank, rank.pending[b])]

    def _waits(self, rank: _Rank, operation: tuple) -> bool:
        return operation[0] == "take" and rank.memory.get(operation[1], ARMED) is ARMED

    def step(self, rank: _Rank, block: Block) -> None:
        operation = rank.pending[block]
        if operation[0] == "push":
            self._push(rank, *operation[1:])
        elif operation[0] == "take":
            self._take(rank, *operation[1:])
        else:
            rank.memory[operation[1]] = ARMED
        self._next(rank, block)

    def _next(self, rank: _Rank, block: Block) -> None:
        try:
            rank.pending[block] = next(block)
        except StopIteration:
            rank.blocks.remove(block)
            if not rank.blocks:
                rank.call += 1
                self.outcome.finished[rank.rank] = rank.call

    def _push(self, rank: _Rank, owner: int, place: Place, value: object) -> None:
        if self.faults.drop.get((rank.rank, owner)) == rank.call and place[3] == 0:
            return
        self.under_way.append((owner, place, value))

    def arrive(self, index: int) -> None:
        owner, place, value = self.under_way.pop(index)
        self.ranks[owner].memory[place] = value

    def _take(self, rank: _Rank, place: Place, expected: object) -> None:
        found = rank.memory[place]
        if found != expected:
            self.outcome.stale.append(f"rank {rank.rank} call {rank.call} expected {expected}, found {found}")
        if self.rules.rearm == "at once":
            rank.memory[place] = ARMED
        rank.taken.append(place)

    def expire(self, rank: _Rank) -> None:
        """The deadline passes: every wait of the rank names whom it waits for, and the rank gives up."""
        sources = {rank.pending[block][1][2] for block in rank.blocks if self._waits(rank, rank.pending[block])}
        self.outcome.missing.setdefault(rank.rank, set()).update(sources)
        rank.gave_up = True


def simulate(seed: int, world: int, calls: list[tuple[str, int]], **options) -> Outcome:
    """Run `calls` [(strategy, rows)] on all ranks under the adversary of `seed`. Options as for Machine."""
    machine = Machine(world, calls, **options)
    pick = random.Random(seed)
    while True:
        choices: list[tuple] = [("arrive",)] * min(3, len(machine.under_way))
        for rank in machine.ranks:
            if machine.runnable(rank):
                if not rank.blocks:
                    choices.append(("begin", rank))
                choices += [("step", rank, block) for block in machine.ready(rank)]
        if not choices:
            waiting = [rank for rank in machine.ranks if machine.runnable(rank)]
            if not waiting:
                return machine.outcome
            for rank in waiting:
                machine.expire(rank)
            continue
        patient = [c for c in choices if len(c) == 1 or c[1].rank not in machine.faults.slow]
        action, *arguments = pick.choice(choices if not patient or pick.random() < 0.02 else patient)
        if action == "arrive":
            machine.arrive(pick.randrange(len(machine.under_way)))
        elif action == "begin":
            machine.begin(*arguments)
        else:
            machine.step(*arguments)


def run_threads(world: int, calls: list[tuple[str, int]], deadline_seconds: float, **options) -> Outcome:
    """The same with one thread a rank; stores arrive at once, waits end at the deadline."""
    machine = Machine(world, calls, **options)

    def body(rank: _Rank) -> None:
        while machine.runnable(rank):
            machine.begin(rank)
            end = time.monotonic() + deadline_seconds
            while rank.blocks and not rank.gave_up:
                ready = machine.ready(rank)
                for block in ready:
                    _step_and_deliver(machine, rank, block)
                if not ready and time.monotonic() > end:
                    machine.expire(rank)
                if not ready or rank.rank in machine.faults.slow:
                    time.sleep(0.0005)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in machine.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return machine.outcome


def _step_and_deliver(machine: Machine, rank: _Rank, block: Block) -> None:
    operation = rank.pending[block]
    if operation[0] == "push":
        owner, place, value = operation[1:]
        if machine.faults.drop.get((rank.rank, owner)) != rank.call or place[3] != 0:
            machine.ranks[owner].memory[place] = value
        machine._next(rank, block)
    else:
        machine.step(rank, block)
