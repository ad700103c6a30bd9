"""The kernels' protocol without a GPU: the same pushes, waits and re-arms, under every order that memory allows.

What may come next is a block's next operation, or the arrival of one of the stores under way, in any order. `explore`
tries all orders, where calls are few and small; `simulate` lets a seeded adversary pick. Faults slow a rank, drop
stores, kill a rank, or let it call with another number of rows. Time passes only when nothing else can happen: a wait
expires exactly when it would be for ever.

`run_threads` drives the same machine by one real thread a rank, with a deadline on the clock.
"""

import random
import threading
import time
from collections.abc import Sequence

from shardwise.comm.p2p.machine import Machine, Outcome, Rank


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

    def body(rank: Rank) -> None:
        while machine.runnable(rank):
            machine.begin(rank)
            end = time.monotonic() + deadline_seconds
            while rank.at and not rank.gave_up:
                late = time.monotonic() > end
                ready = machine.ready(rank)
                for choice in ready:
                    with one_at_a_time:
                        machine.step(rank, *choice)
                        while machine.under_way:
                            machine.arrive(0)
                if not ready and late:
                    machine.expire(rank)
                if not ready or rank.rank in machine.faults.slow:
                    time.sleep(0.0005)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in machine.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return machine.outcome
