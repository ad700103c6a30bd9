"""The script of a rank that somebody else's launcher starts: python own_rank.py kill|wait|done|late"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from shardwise.comm import watch
from shardwise.launch import env
from shardwise.launch.worker import run_here

INFO = env.detect()
LOGS = Path(os.environ["SHARDWISE_LOG_DIR"])


def watched_by(pid: int) -> bool:
    """Whether that process has a descriptor that tells it of this one's end."""
    for descriptor in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if f"Pid:\t{os.getpid()}\n" in descriptor.read_text():
                return True
    return False


def body() -> None:
    if sys.argv[1] == "late":
        import shardwise.comm.strategy  # which takes each rank another while
    with watch.phase("load"):
        unfinished = LOGS / f"{INFO.rank}.started"
        unfinished.write_text(str(os.getpid()))
        unfinished.rename(LOGS / f"{INFO.rank}.ready")
        while len(list(LOGS.glob("*.ready"))) < INFO.world:
            time.sleep(0.01)
        if sys.argv[1] == "kill" and INFO.rank == 1:
            others = [int((LOGS / f"{rank}.ready").read_text()) for rank in range(INFO.world) if rank != INFO.rank]
            while not all(map(watched_by, others)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "late" and INFO.rank != 1:
            shardwise.comm.strategy.create(INFO, deadlines=watch.Deadlines(rendezvous=3))
        if sys.argv[1] != "done":
            time.sleep(100)


run_here(INFO, body, debug=False)
