"""What goes wrong, as job functions: rank 1 misbehaves as the payload says, the others wait."""

import os
import signal
import sys
import time
from pathlib import Path


def crash(context):
    """Rank 1 does `payload["fault"]`; everyone else is busy for longer than any test waits."""
    with context.phase("run"):
        if context.info.rank == 1:
            time.sleep(0.05)
            FAULTS[context.payload["fault"]]()
        time.sleep(60)


def fail_then_drag(context):
    """Rank 0 complains of its peer before rank 1, slower, tells of its own failure, which came first."""
    if context.info.rank == 1:
        try:
            raise KeyError("the cause")
        except KeyError:
            raise
    time.sleep(0.1)
    raise ConnectionError("connection closed by peer")


def skip_collective(context):
    """Rank 1 never enters the second all-reduce."""
    import torch

    group = context.communicator()
    group.all_reduce(torch.ones(4))
    if context.info.rank == 1:
        forget_to_come()
    group.all_reduce(torch.ones(4))


def forget_to_come():
    time.sleep(60)


def mismatch(context):
    """The ranks disagree on the shape."""
    import torch

    context.communicator().all_reduce(torch.ones(4 + context.info.rank))


def talk(context):
    """Report and wait for the end."""
    context.emit("ready")
    time.sleep(60)


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
    time.sleep(60)


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


def import_fails(context):
    raise AssertionError(f"not reached {Path.cwd()}")
