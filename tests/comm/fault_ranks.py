"""Ranks with something wrong: what the others see is returned as (exception's name, text, missing ranks, seconds)."""

import atexit
import os
import pickle
import signal
import threading
import time

import torch

from shardwise.comm import sharing, watch
from shardwise.comm.base import CommError
from shardwise.comm.bootstrap import FolderStore
from shardwise.comm.strategy import create
from shardwise.comm.watch import Deadlines


def outcome(call):
    """What `call` raises, as plain values."""
    begin = time.monotonic()
    try:
        call()
    except CommError as error:
        return type(error).__name__, str(error), getattr(error, "missing", ()), time.monotonic() - begin
    return "nothing", "", (), time.monotonic() - begin


class Board:
    """Where the ranks of one test tell each other, and the test, how far they are; beside the group under test."""

    def __init__(self, folder, info):
        self.store, self.info = FolderStore(folder), info

    def tell(self, key, value=None):
        self.store.set(f"{key}/{self.info.rank}", pickle.dumps(value))

    def hear(self, key, *ranks):
        """Wait for these ranks, or all."""
        return [pickle.loads(self.store.get(f"{key}/{rank}", 100)) for rank in ranks or range(self.info.world)]

    def leave(self, value):
        """`value` for the test; this rank stays until all have come so far."""
        self.tell("left", value)
        self.hear("left")


def left(folder, world):
    """What each rank has left on the board."""
    return [pickle.loads(FolderStore(folder).get(f"left/{rank}", 0.1)) for rank in range(world)]


def one_rank_is_slow_then_late(info, store, transport, late, folder):
    torch.set_num_threads(1)
    board = Board(folder, info)
    group = create(info, transport=transport, store=store, deadlines=Deadlines(collective=60))
    others = [rank for rank in range(info.world) if rank != late]
    group.all_reduce(torch.ones(4))
    if info.rank == late:
        board.hear("waits", *others)
        time.sleep(0.5)
        group.all_reduce(torch.ones(4))
        board.hear("gave up", *others)
        board.leave(None)
        return
    slow = outcome(lambda: (board.tell("waits"), group.all_reduce(torch.ones(4))))
    group.deadlines = Deadlines(collective=1.5)
    board.tell("comes")
    board.hear("comes", *others)
    result = outcome(lambda: group.all_reduce(torch.ones(4)))
    again = outcome(lambda: group.all_reduce(torch.ones(4)))
    board.tell("gave up")
    board.leave((slow, result, again, watch.FLIGHT.last()))


def one_rank_waits_longer(info, store, transport, folder):
    """Rank 2 stays away; rank 1 waits until rank 0, which has the shorter deadline, gives up and aborts."""
    torch.set_num_threads(1)
    board = Board(folder, info)
    if transport != "gloo":
        transport, sharing.usable = "mpi", lambda: (False, "not today")
    group = create(info, transport=transport, store=store, deadlines=Deadlines(collective=60))
    group.all_reduce(torch.ones(4))
    seen = None
    if info.rank == 0:
        board.hear("comes", 1)
        group.deadlines = Deadlines(collective=1)
        seen = outcome(lambda: group.all_reduce(torch.ones(4)))
        group.abort("rank 0 has given up")
    elif info.rank == 1:
        board.tell("comes")
        seen = outcome(lambda: group.all_reduce(torch.ones(4)))
    board.leave(seen)


def one_rank_dies(info, store, transport, victim):
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, deadlines=Deadlines(collective=60))
    group.all_reduce(torch.ones(4))
    if info.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome(lambda: group.all_reduce(torch.ones(4)))


def one_rank_dies_of_a_difference(info, store):
    """Rank 1 calls something else, and is gone before it has told what."""
    torch.set_num_threads(1)
    group = create(info, transport="shm", store=store, deadlines=Deadlines(collective=60))
    group.all_reduce(torch.ones(4))
    if info.rank == 1:
        group.segment.calls = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        group.barrier()
    return outcome(lambda: group.all_reduce(torch.ones(4)))


def fork_and_call(info, store, transport):
    """How a forked process ends that calls on its parent's group and then leaves in order; the group afterwards."""
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, deadlines=Deadlines(collective=60))
    x = torch.ones(4)
    for _ in range(2):
        group.all_reduce(x, out=x.fill_(1))
    child = os.fork()
    if not child:
        kind, text, *_ = outcome(lambda: group.all_reduce(x, out=x.fill_(7)))
        atexit._run_exitfuncs()
        os._exit(0 if kind == "CommError" and "forked" in text else 1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return ended, group.all_reduce(x.fill_(1)).tolist(), outcome(group.barrier)[0]


def rank_0_aborts(info, store, transport, folder):
    """What ranks 1 to 3 see in the world, then (in a second world) rank 2 in a sub-group that waits for rank 3."""
    torch.set_num_threads(1)
    results = []
    for in_sub_group in (False, True):
        world = create(info, transport=transport, store=store, deadlines=Deadlines(collective=60))
        part = world.split(info.rank // 2)
        world.barrier()
        if info.rank == 0:
            time.sleep(0.3)
            world.abort("rank 0 ran out of ideas")
        waits = info.rank == 2 if in_sub_group else info.rank > 0
        results.append(outcome((part if in_sub_group else world).barrier) if waits else None)
    Board(folder, info).leave(results)  # nobody's end may be taken for the abort


def two_threads_call_at_once(info, store):
    """What the threads of this rank see that use one group at the same time, long enough to meet in it."""
    torch.set_num_threads(1)
    group = create(info, transport="shm", store=store, deadlines=Deadlines(collective=3))
    seen = []

    def body():
        seen.append(outcome(lambda: [group.all_reduce(torch.ones(1000)) for _ in range(20_000)]))

    threads = [threading.Thread(target=body) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def rank_1_aborts_and_is_gone(info, store):
    """What rank 0 of a gloo group sees whose peer gave its reason and left before anybody looked for it."""
    torch.set_num_threads(1)
    group = create(info, transport="gloo", store=store, deadlines=Deadlines(collective=60))
    group.all_reduce(torch.ones(4))
    if info.rank == 1:
        group.store.set("abort", b"rank 1 lost its files")
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome(lambda: group.all_reduce(torch.ones(4)))


def calls_differ(info, store, transport, check, folder):
    """For every way in which two calls can differ, what this rank sees."""
    torch.set_num_threads(1)
    odd = info.rank == 1
    calls = {
        "shape": lambda group: group.all_reduce(torch.ones(5 if odd else 4)),
        "dtype": lambda group: group.all_reduce(torch.ones(4, dtype=torch.bfloat16 if odd else torch.float32)),
        "op": lambda group: group.barrier() if odd else group.all_reduce(torch.ones(4)),
        "strategy": lambda group: group.all_reduce(torch.ones(4), strategy="TWOSHOT" if odd else "AUTO"),
        "root": lambda group: group.broadcast(torch.ones(4), root=int(odd)),
        "part": lambda group: group.reduce_scatter(torch.ones(9 if odd else 8)),
        "object": lambda group: group.all_gather_object(1) if odd else group.all_reduce(torch.ones(4)),
        "nothing": lambda group: group.all_reduce(torch.ones(0 if odd else 4)),
        "large": lambda group: group.all_reduce(torch.ones(1 << 22 if odd else 1 << 19)),
        "large parts": lambda group: group.reduce_scatter(torch.ones(1 << 22 if odd else 1 << 19)),
        "colors": lambda group: group.split_known([0, 0] if odd else [0, 1]),
        "sizes": lambda group: group.all_gather(torch.ones(4), 0, [4, 4] if odd else [4, 3 + 1]),
    }
    results = {}
    for how, call in calls.items():
        group = create(info, transport=transport, store=store, check=check, deadlines=Deadlines(collective=60))
        group.all_reduce(torch.ones(4))
        results[how] = outcome(lambda call=call, group=group: call(group))
    Board(folder, info).leave(results)
