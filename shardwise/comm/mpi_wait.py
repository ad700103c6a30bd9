"""A deadline for MPI's own waits: MPI_Init, and the first calls by which the ranks of a job meet.

MPI bounds neither, and no exception reaches a thread that is inside of them. So another thread ends the process, with
a sentence. It bears the wait's name, which the other ranks of its host find in /proc: one without it has not come.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardwise.comm import watch
from shardwise.comm.base import CollectiveTimeout

PR_SET_NAME = 15  # <linux/prctl.h>: of the calling thread
NAME = b"awaits MPI"
JOB, RANK = b"PMIX_NAMESPACE=", b"OMPI_COMM_WORLD_RANK="
"""By these Open MPI tells a process its job and its rank; of other MPIs' ranks we cannot say which job they are of."""


@contextlib.contextmanager
def bounded(rank: int, ranks: Sequence[int], seconds: float) -> Iterator[None]:
    """World rank `rank` waits in the block, inside MPI, for all of `ranks`; after `seconds` its process ends.

    What is called must release the interpreter's lock.
    """
    named, over = threading.Event(), threading.Event()

    def look() -> None:
        ctypes.CDLL(None).prctl(PR_SET_NAME, NAME, 0, 0, 0)
        named.set()
        if not over.wait(seconds):
            watch.give_up(_timeout(rank, ranks, seconds))

    threading.Thread(target=look, name=NAME.decode(), daemon=True).start()
    named.wait()
    try:
        yield
    finally:
        over.set()


def _timeout(rank: int, ranks: Sequence[int], seconds: float) -> CollectiveTimeout:
    here = _ranks_here()
    missing = tuple(each for each in ranks if not here.get(each, True))
    who = f"rank(s) {', '.join(map(str, missing))} did not arrive"
    if not missing:
        who = f"not all {len(ranks)} ranks arrived" + (", those of this host did," if len(here) > 1 else "")
    return CollectiveTimeout(f"rendezvous by MPI, rank {rank}: {who} within {seconds:g} s", missing)


def _ranks_here() -> dict[int, bool]:
    """The ranks of this job on this host, and whether each waits here. A rank may have more than one process."""
    job = JOB + os.environb.get(JOB.rstrip(b"="), b"")
    ranks: dict[int, bool] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            variables = (process / "environ").read_bytes().split(b"\0")
            numbers = [int(each.removeprefix(RANK)) for each in variables if each.startswith(RANK)]
            if numbers and job in variables:
                ranks[numbers[0]] = ranks.get(numbers[0], False) or _waits(process)
    return ranks


def _waits(process: Path) -> bool:
    return any(task.read_bytes().strip() == NAME for task in process.glob("task/*/comm"))
