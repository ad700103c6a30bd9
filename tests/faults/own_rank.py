"""The script of a rank that somebody else's launcher starts: python own_rank.py kill|wait|done"""

import os
import signal
import sys
import time
from pathlib import Path

from shardwise.comm import watch
from shardwise.launch import env
from shardwise.launch.neighbours import LOOK_SECONDS
from shardwise.launch.worker import run_here

INFO = env.detect()
LOGS = Path(os.environ["SHARDWISE_LOG_DIR"])


def body() -> None:
    with watch.phase("load"):
        (LOGS / f"{INFO.rank}.ready").touch()
        while len(list(LOGS.glob("*.ready"))) < INFO.world:
            time.sleep(0.01)
        if sys.argv[1] == "kill" and INFO.rank == 1:
            time.sleep(10 * LOOK_SECONDS)  # until the others know of this rank
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] != "done":
            time.sleep(60)


run_here(INFO, body, debug=False)
