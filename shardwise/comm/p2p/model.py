"""The kernels' protocol without a GPU: the same pushes, waits and re-arms, under every order that memory allows.

A block of a call is a list of memory operations on words at the kernels' addresses; a rank runs the blocks of one call
together, and its next call when all have ended. What may come next is a block's next operation, or the arrival of one
of the stores under way, in any order. `explore` tries all orders, where calls are few and small; `simulate` lets a
seeded adversary pick. Faults slow a rank, drop stores, kill a rank, or let it call with another number of rows. Time
passes only when nothing else can happen: a wait expires exactly when it would be for ever.

`run_threads` drives the same machine by one real thread a rank, with a deadline on the clock.
"""

import random
import threading
import time
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


class _Rank:
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
        self.ranks = [_Rank(rank) for rank in range(world)]
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

    def runnable(self, rank: _Rank) -> bool:
        alive = self.faults.dead.get(rank.rank, len(self.calls)) > rank.call
        return alive and not rank.gave_up and rank.call < len(self.calls)

    def begin(self, rank: _Rank) -> None:
        rank.at = [0] * len(self.programs[rank.rank][rank.call])
        self._end(rank)

    def _end(self, rank: _Rank) -> None:
        """The call is over when all its blocks are."""
        if all(at == len(block) for at, block in zip(rank.at, self.programs[rank.rank][rank.call], strict=True)):
            rank.call += 1
            rank.at = []
            self.outcome.finished[rank.rank] = rank.call

    def waiting(self, rank: _Rank) -> list[tuple[int, Operation]]:
        """(block, its next operation) of the blocks that have not ended."""
        if not rank.at:
            return []
        blocks = self.programs[rank.rank][rank.call]
        return [(i, blocks[i][at]) for i, at in enumerate(rank.at) if at < len(blocks[i])]

    def ready(self, rank: _Rank) -> list[tuple[int, Operation]]:
        """Those whose next operation can be done now."""
        return [(block, op) for block, op in self.waiting(rank) if op.kind != "take" or op.address in rank.memory]

    def step(self, rank: _Rank, block: int, operation: Operation) -> None:
        if operation.kind == "push":
            self._push(rank, operation)
        elif operation.kind == "take":
            self._take(rank, operation)
        else:
            rank.memory.pop(operation.address, None)
        rank.at[block] += 1
        self._end(rank)

    def _push(self, rank: _Rank, operation: Operation) -> None:
        if self.faults.drop.get((rank.rank, operation.owner)) != rank.call or operation.address[2] != 0:
            assert operation.value is not None
            self.under_way.append((operation.owner, operation.address, operation.value))

    def arrive(self, index: int) -> None:
        owner, address, value = self.under_way.pop(index)
        memory = self.ranks[owner].memory
        if address in memory and self.rules.rearm != "never":
            self.outcome.stale.append(f"call {value[0]}: {value} is written over {memory[address]} of rank {owner}")
        memory[address] = value

    def _take(self, rank: _Rank, operation: Operation) -> None:
        found = rank.memory[operation.address]
        if found != operation.value:
            self.outcome.stale.append(f"rank {rank.rank} call {rank.call} expected {operation.value}, found {found}")
        if self.rules.rearm == "at once":
            del rank.memory[operation.address]

    def expire(self, rank: _Rank) -> None:
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


def explore(world: int, calls: Sequence[tuple], **options) -> tuple[int, Outcome]:
    """Run `calls` on all ranks in every order: (number of states, what was found in any). Options as for Machine.

    Ends at the first word that is not what it should be; `finished` and `missing` are of ends where nothing goes on.
    """
    machine = Machine(world, calls, **options)
    machine.push_all()
    seen = {machine.state()}
    unseen = list(seen)
    finished = [len(calls)] * world
    while unseen:
        state = unseen.pop()
        machine.restore(state)
        choices = _choices(machine)
        if not choices:
            finished = [min(least, rank.call) for least, rank in zip(finished, machine.ranks, strict=True)]
            for rank in filter(machine.runnable, machine.ranks):
                machine.expire(rank)
                rank.gave_up = False
        for choice in choices:
            machine.restore(state)
            _do(machine, choice)
            machine.push_all()
            if machine.outcome.stale:
                return len(seen), machine.outcome
            after = machine.state()
            if after not in seen:
                seen.add(after)
                unseen.append(after)
    machine.outcome.finished = finished
    return len(seen), machine.outcome


def _choices(machine: Machine) -> list[tuple]:
    """What can happen next: the arrival of a store by its index, or a rank's step."""
    arrivals: list[tuple] = [(index,) for index in range(len(machine.under_way))]
    return arrivals + [
        (rank, *ready) for rank in machine.ranks if machine.runnable(rank) for ready in machine.ready(rank)
    ]


def _do(machine: Machine, choice: tuple) -> None:
    if len(choice) == 1:
        machine.arrive(*choice)
    else:
        machine.step(*choice)


def simulate(seed: int, world: int, calls: Sequence[tuple], **options) -> Outcome:
    """Run `calls` on all ranks under the adversary of `seed`. Options as for Machine."""
    machine = Machine(world, calls, **options)
    pick = random.Random(seed)
    while True:
        for rank in machine.ranks:
            if not rank.at and machine.runnable(rank) and pick.random() < 0.5:
                machine.begin(rank)
        arrivals, steps = _arrivals_and_steps(machine, pick)
        if not arrivals and not steps:
            between = [rank for rank in machine.ranks if not rank.at and machine.runnable(rank)]
            if between:
                machine.begin(pick.choice(between))
                continue
            waiting = [rank for rank in machine.ranks if machine.runnable(rank)]
            if not waiting:
                return machine.outcome
            for rank in waiting:
                machine.expire(rank)
            continue
        _do(machine, pick.choice(arrivals + steps))


def _arrivals_and_steps(machine: Machine, pick: random.Random) -> tuple[list[tuple], list[tuple]]:
    """Choices, three of the stores under way among them; those of slow ranks rarely, while others have any."""
    choices = _choices(machine)
    stores = [choice for choice in choices if len(choice) == 1]
    arrivals = pick.sample(stores, min(3, len(stores)))
    steps = [choice for choice in choices if len(choice) > 1]
    patient = [choice for choice in steps if choice[0].rank not in machine.faults.slow]
    if (patient or arrivals) and pick.random() > 0.02:
        steps = patient
    return arrivals, steps


def run_threads(world: int, calls: Sequence[tuple], deadline_seconds: float, **options) -> Outcome:
    """The same with one thread a rank; stores arrive at once, waits end at the deadline."""
    machine = Machine(world, calls, **options)
    one_at_a_time = threading.Lock()

    def body(rank: _Rank) -> None:
        while machine.runnable(rank):
            machine.begin(rank)
            end = time.monotonic() + deadline_seconds
            while rank.at and not rank.gave_up:
                ready = machine.ready(rank)
                for choice in ready:
                    with one_at_a_time:
                        machine.step(rank, *choice)
                        while machine.under_way:
                            machine.arrive(0)
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
