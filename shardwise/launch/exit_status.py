"""How a process ended that is not our child, by its pidfd: Linux tells since 6.15, once its parent has reaped it."""

import fcntl
import os
import struct

# <linux/pidfd.h>: struct pidfd_info, in its first version, begins with a mask of what is asked for and given and ends
# with the wait status; PIDFD_GET_INFO is _IOWR(0xFF, 11, struct pidfd_info).
_INFO = struct.Struct("=Q52xi")
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_EXIT = 1 << 3


def exit_code(pidfd: int) -> int | None:
    """As `subprocess` spells it: negative for a signal. None where it is not reaped yet or the kernel does not tell."""
    info = bytearray(_INFO.pack(_EXIT, 0))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError:
        return None
    given, status = _INFO.unpack(info)
    return os.waitstatus_to_exitcode(status) if given & _EXIT else None
