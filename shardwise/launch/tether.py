"""Run a program that dies with the process that started it: `python -I -S tether.py PID COMMAND...`

A launcher (mpirun, torchrun) does not watch its own parent. The kernel does, when asked between fork and exec; asking
from a small process of our own is safe where threads run, which a hook in the forked child is not. Standard library
only, since it starts without site packages.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; the setting survives exec


def main() -> None:
    parent = int(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        sys.exit(128 + signal.SIGKILL)
    os.execvp(sys.argv[2], sys.argv[2:])


main()
