"""What goes wrong, as job functions: rank 1 misbehaves as the payload says, the others wait."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

BUSY_SECONDS = 100
"""Longer than any test waits for a report."""


def crash(context):
    """Rank 1 does `payload["fault"]` while rank 0 is busy."""
    with context.phase("run"):
        if context.info.rank == 0:
            (logs() / "busy").touch()
        else:
            wait_for(logs() / "busy")
            FAULTS[context.payload["fault"]]()
        time.sleep(BUSY_SECONDS)


def drag_down(context):
    """Rank 1 fails; rank 0 hears of it as a broken connection, and its complaint is the first to arrive."""
    if context.info.rank == 0:
        raise ConnectionError("connection closed by peer")
    wait_for(logs() / "failure-rank-0.json")
    raise KeyError("the cause")


def absent_from_rendezvous(context):
    """Rank 1 fails before it joins; rank 0 waits for it."""
    if context.info.rank == 1:
        raise RuntimeError("no device for this rank")
    context.communicator()


def wait(context):
    with context.phase("run"):
        time.sleep(BUSY_SECONDS)


def skip_collective(context):
    """Rank 1 never enters the second all-reduce; the deadline that was given is the second one's alone."""
    import torch

    from shardwise.comm.watch import Deadlines

    group = context.communicator()
    given, group.deadlines = group.deadlines, Deadlines(collective=60)
    group.all_reduce(torch.ones(4))
    group.deadlines = given
    if context.info.rank == 1:
        forget_to_come()
    group.all_reduce(torch.ones(4))


def killed_amid_collectives(context):
    """Rank 1 is killed from outside of its main thread, which is in one all-reduce after the other."""
    import torch

    group = context.communicator()
    if context.info.rank == 1:
        threading.Timer(0.2, FAULTS["SIGKILL"]).start()
    with context.phase("run"):
        while True:
            group.all_reduce(torch.ones(4))


def logs():
    return Path(os.environ["SHARDWISE_LOG_DIR"])


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def forget_to_come():
    time.sleep(BUSY_SECONDS)


def talk(context):
    """Report and wait for the end."""
    context.emit("ready")
    time.sleep(BUSY_SECONDS)


def nap(context):
    time.sleep(1.0)
    return context.payload["name"]


def echo(context):
    return {"rank": context.info.rank, "world": context.info.world, "source": context.info.source, **context.payload}


def all_reduce(context):
    import torch

    total = context.communicator().all_reduce(torch.full((3,), float(context.info.rank + 1)))
    return total.tolist()


def noisy(context):
    """Ten megabytes on stderr, then death."""
    if context.info.rank == 1:
        for _ in range(160):
            sys.stderr.write("x" * 65536 + "\n")
        os._exit(7)
    time.sleep(BUSY_SECONDS)


def segfault():
    import ctypes

    ctypes.string_at(0)


def raise_error():
    raise RuntimeError("boom on purpose")


FAULTS = {
    "raise": raise_error,
    "sys.exit": lambda: sys.exit(3),
    "os._exit": lambda: os._exit(5),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": segfault,
}
